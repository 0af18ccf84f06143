-- name: ensure_model
insert into model (name) values (%(model)s) on conflict do nothing

-- name: record
insert into dataset (digest, model, counts, sources, parent)
values (%(digest)s, %(model)s, %(counts)s, %(sources)s, (select digest from dataset where digest = %(parent)s))
on conflict (digest) do nothing
