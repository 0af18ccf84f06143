-- name: keep
insert into evidence (digest, kind, body) values (%(digest)s, %(kind)s, %(body)s) on conflict (digest) do nothing

-- name: read
select body from evidence where digest = %(digest)s
