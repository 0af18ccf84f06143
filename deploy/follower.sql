-- name: deployments
select d.model, d.generation, d.champion, d.challenger, d.challenger_share, d.shadow,
       m.settings -> 'monitoring' as monitoring
from deployment d join model m on m.name = d.model

-- name: monitoring
select settings -> 'monitoring' as monitoring from model where name = %(model)s

-- name: champions
select action, to_version from ledger where model = %(model)s and slot = 'champion' order by generation

-- name: version
select model, number, bundle_digest, profile, extract(epoch from created_at)::bigint as created
from version where model = %(model)s and number = %(number)s

-- name: engines
select id, base_digest, url, seen_at > now() - interval '15 seconds' as fresh from engine order by started_at, id

-- name: report
insert into replica (id, model, generation, ready, message)
values (%(id)s, %(model)s, %(generation)s, %(ready)s, %(message)s)
on conflict (id, model) do update
set generation = excluded.generation, ready = excluded.ready, message = excluded.message, seen_at = now()

-- name: leave
delete from replica where id = %(id)s

-- name: forget_replicas
delete from replica where seen_at < now() - interval '1 day'
