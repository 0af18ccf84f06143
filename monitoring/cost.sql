-- name: price
select (select settings #> '{monitoring,price}' from model where name = %(model)s) as price
