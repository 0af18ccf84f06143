-- name: price
select (select settings #> '{monitoring,price}' from model where name = %(model)s) as price

-- name: making
-- What it took to make versions: the time of their runs' stages, a search's among them
select v.number as version, v.created_at, v.study, coalesce(sum(s.seconds), 0)::float8 as seconds
from version v left join stage s on s.run_id = v.run_id
where v.model = %(model)s and v.number = any(%(versions)s)
group by v.number, v.created_at, v.study

-- name: keys
select u.key_id, k.name, sum(u.requests)::bigint as requests,
    sum(u.prompt_tokens + u.completion_tokens)::bigint as tokens, sum(u.cost_nano_usd)::float8 / 1e9 as usd
from key_usage u left join api_key k on k.id = u.key_id
where u.model = %(model)s and u.version = any(%(versions)s) and u.day >= %(since)s and u.day <= %(until)s
group by u.key_id, k.name
order by usd desc, requests desc limit 50

-- name: evaluation
select e.body -> 'about' -> 'cost' as cost from version v join evidence e on e.digest = v.evaluation
where v.model = %(model)s and v.number = %(version)s

-- name: all_versions
select number from version where model = %(model)s
