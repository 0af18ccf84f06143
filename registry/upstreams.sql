-- name: put
insert into upstream (name, url, key_env, timeout_seconds, actor)
values (%(name)s, %(url)s, nullif(%(key_env)s::text, ''), coalesce(%(timeout_seconds)s::real, 60), %(actor)s)
on conflict (name) do update
set url = excluded.url,
    key_env = case when %(key_env)s::text is null then upstream.key_env else excluded.key_env end,
    timeout_seconds = coalesce(%(timeout_seconds)s::real, upstream.timeout_seconds),
    actor = excluded.actor, at = now()

-- name: get
select name, url, key_env, timeout_seconds from upstream where name = %(name)s

-- name: all
select name, url, key_env, timeout_seconds from upstream

-- name: in_use
select v.model, v.number
from version v join deployment d on d.model = v.model
where v.manifest -> 'hosted' -> 'models' @> jsonb_build_array(jsonb_build_object('upstream', %(name)s::text))
    and (v.number in (d.champion, d.challenger, d.shadow) or exists (
        select from ledger l where l.model = v.model and l.slot = 'champion' and l.to_version = v.number))
order by v.model, v.number limit 1

-- name: remove
delete from upstream where name = %(name)s

-- name: listing
select u.name, u.url, u.key_env, u.timeout_seconds, u.actor, u.at, array(
    select distinct d.model
    from deployment d join version v on v.model = d.model and v.number in (d.champion, d.challenger, d.shadow)
    where v.manifest -> 'hosted' -> 'models' @> jsonb_build_array(jsonb_build_object('upstream', u.name))
    order by d.model) as models
from upstream u order by u.name
