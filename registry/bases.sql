-- name: find
select * from base where id = %(id)s and revision = %(revision)s and dtype = %(dtype)s order by created_at desc

-- name: known
select * from base where id = %(id)s order by created_at desc

-- name: get
select * from base where digest = %(digest)s

-- name: insert
insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)
values (%(digest)s, %(id)s, %(revision)s, %(tokenizer_digest)s, %(template_digest)s, %(parameters)s, %(dtype)s)
on conflict do nothing
