-- name: forget_address
delete from engine where url = %(url)s

-- name: register
insert into engine (id, base_digest, url) values (%(id)s, %(base_digest)s, %(url)s)
on conflict (id) do update set seen_at = now()

-- name: remove
delete from engine where id = %(id)s
