-- name: served
-- Every version that holds a slot; `waits` when a retraining of the model was held back, for want of corrections say.
select d.model, m.settings, slots.version, slots.slot, coalesce(newest.state = 'refused', false) as waits
from deployment d join model m on m.name = d.model
left join lateral (
    select state from retrain_request r where r.model = d.model order by r.at desc limit 1) as newest on true
cross join lateral (values
    (d.champion, 'champion'), (d.challenger, 'challenger'), (d.shadow, 'shadow')) as slots (version, slot)
where slots.version is not null
order by d.model, slots.slot

-- name: now
select now() as now

-- name: soon
set local lock_timeout = '2s'

-- name: old_partitions
-- Day partitions whose last event is older than what is kept.
select c.relname as name
from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'request_event'::regclass and c.relname ~ '^request_event_[0-9]{8}$'
    and to_date(right(c.relname, 8), 'YYYYMMDD') < (now() at time zone 'utc')::date - %(days)s

-- name: drop_default_events
delete from request_event_default where at < now() - make_interval(days => %(days)s)
