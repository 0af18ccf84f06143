-- name: alerts
select model, coalesce(version::text, '') as version, rule, severity, coalesce(cause, '') as cause
from alert where closed_at is null

-- name: serving
select model, generation, champion from deployment where champion is not null

-- name: drift
select distinct on (v.model, v.version) v.model, v.version, v.verdict
from verdict v join deployment d on d.model = v.model and v.version in (d.champion, d.challenger, d.shadow)
order by v.model, v.version, v.at desc

-- name: watcher
select extract(epoch from expires_at - now()) as seconds from lease where name = 'watch'

-- name: today
select model, version, requests, errors, (sketches -> 'numbers' ->> 3)::float8 / 1e9 as cost_usd
from traffic_window
where grain = 'day' and start = date_trunc('day', now(), 'UTC')
