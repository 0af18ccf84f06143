-- name: price
select (select settings #> '{monitoring,price}' from model where name = %(model)s) as price

-- name: making
-- What it took to make versions: the time of their runs' stages, a search's among them; all that they ever answered; and
-- what their evaluation says a thousand requests cost, with them and with their base alone
select v.number as version, coalesce(s.seconds, 0)::float8 as seconds, coalesce(w.requests, 0)::bigint as requests,
    (e.cost #>> '{candidate,estimate}')::float8 as own_usd, (e.cost #>> '{base,estimate}')::float8 as base_usd
from version v
left join lateral (
    select e.body #> '{metrics,cost_per_1000_usd}' as cost from judged j join evidence e on e.digest = j.evaluation
    where j.model = v.model and j.number = v.number) e on true
left join lateral (select sum(seconds) as seconds from stage where run_id = v.run_id) s on true
left join lateral (
    select sum(requests) as requests from traffic_window
    where model = v.model and version = v.number and grain = 'day') w on true
where v.model = %(model)s and v.number = any(%(versions)s)

-- name: keys
select u.key_id, k.name, sum(u.requests)::bigint as requests,
    sum(u.prompt_tokens + u.completion_tokens)::bigint as tokens, sum(u.cost_nano_usd)::float8 / 1e9 as usd
from key_usage u left join api_key k on k.id = u.key_id
where u.model = %(model)s and u.version = any(%(versions)s) and u.day >= %(since)s and u.day <= %(until)s
group by u.key_id, k.name
order by usd desc, requests desc limit 50

-- name: evaluation
select e.body -> 'about' -> 'cost' as cost from judged v join evidence e on e.digest = v.evaluation
where v.model = %(model)s and v.number = %(version)s

-- name: monthly_limit
select amount from allowance where scope = 'model' and name = %(model)s and kind = 'usd_month'

-- name: by_day
-- The fourth number of a window is its cost, in billionths of a dollar (windows.to_json)
select (start at time zone 'utc')::date as day, sum((sketches #>> '{numbers,3}')::bigint)::float8 / 1e9 as usd
from traffic_window
where model = %(model)s and grain = 'day' and (start at time zone 'utc')::date between %(since)s and %(until)s
group by 1
