-- name: alerts
select model, coalesce(version::text, '') as version, rule, severity, coalesce(cause, '') as cause
from alert where closed_at is null

-- name: serving
select model, generation, champion from deployment where champion is not null

-- name: drift
-- The last of each version that serves, by one look into the index
select d.model, s.version, v.verdict
from deployment d
cross join lateral unnest(array[d.champion, d.challenger, d.shadow]) as s (version)
cross join lateral (
    select verdict from verdict where model = d.model and version = s.version order by at desc limit 1) v

-- name: watcher
select extract(epoch from expires_at - now()) as seconds from lease where name = 'watch'

-- name: today
-- By version, whose index begins with it
select w.model, w.version, w.requests, w.errors, (w.sketches -> 'numbers' ->> 3)::float8 / 1e9 as cost_usd
from version v
join traffic_window w on w.model = v.model and w.version = v.number
    and w.grain = 'day' and w.start = date_trunc('day', now(), 'UTC')
