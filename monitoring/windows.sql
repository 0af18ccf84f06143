-- name: lock_closing
select pg_advisory_xact_lock(hashtext('tunesmith windows'))

-- name: open_batches
select id, first_at, last_at
from (
    select id, first_at, last_at, sum(rows) over (order by created_at, id) - rows as before
    from (select * from event_batch where windowed_at is null order by created_at limit 500) oldest
) waiting
where before < %(rows)s

-- name: events
-- The bounds on `at` keep this to a few pages of a partition.
select e.model, e.version, e.at, e.slot, e.key_id, e.status, e.prompt_tokens, e.completion_tokens, e.ttft_ms, e.latency_ms,
    e.engine_seconds, e.cost_usd, e.features, e.messages
from request_event e
where e.batch = any(%(batches)s) and e.at between %(since)s and %(until)s

-- name: our_keys
select id from api_key where not watched

-- name: mark_windowed
update event_batch set windowed_at = now(), to_export = %(export)s where id = any(%(batches)s)

-- name: uncounted_feedback
-- Whose minute has a window by now, or is so long ago that it has none any more
select f.request_id, f.request_at, f.model, f.version, f.counts, f.counted
from feedback f
where f.counts <> f.counted and f.version is not null
    and (f.request_at < now() - make_interval(days => %(minute_days)s)
        or exists (
            select from traffic_window w
            where w.model = f.model and w.version = f.version and w.grain = 'minute'
                and w.start = date_trunc('minute', f.request_at)
        ))
order by f.request_at limit %(rows)s
for update of f

-- name: counted_feedback
update feedback set counted = %(counts)s where request_id = %(request_id)s

-- name: get_windows
select model, version, grain, start, requests, errors, sketches
from traffic_window
where (model, version, grain, start) in (
    select * from unnest(%(models)s::text[], %(versions)s::int[], %(grains)s::text[], %(starts)s::timestamptz[])
)

-- name: put_window
insert into traffic_window (model, version, grain, start, requests, errors, sketches)
values (%(model)s, %(version)s, %(grain)s, %(start)s, %(requests)s, %(errors)s, %(sketches)s)
on conflict (model, version, grain, start) do update
    set requests = excluded.requests, errors = excluded.errors, sketches = excluded.sketches

-- name: add_key_usage
insert into key_usage (model, version, key_id, day, requests, prompt_tokens, completion_tokens, cost_nano_usd)
values (%(model)s, %(version)s, %(key_id)s, %(day)s, %(requests)s, %(prompt)s, %(completion)s, %(cost)s)
on conflict (model, day, version, key_id) do update
    set requests = key_usage.requests + excluded.requests,
        prompt_tokens = key_usage.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = key_usage.completion_tokens + excluded.completion_tokens,
        cost_nano_usd = key_usage.cost_nano_usd + excluded.cost_nano_usd

-- name: read_windows
-- Whole days, the whole hours at both sides of them, the minutes at both ends: at most some 150 rows of any span.
select start, grain, requests, errors, sketches
from traffic_window
where model = %(model)s and version = %(version)s and (
    (grain = 'day' and start >= %(day_from)s and start < %(day_to)s)
    or (grain = 'hour' and start >= %(hour_from)s and start < %(day_from)s)
    or (grain = 'hour' and start >= %(day_to)s and start < %(hour_to)s)
    or (grain = 'minute' and start >= %(minute_from)s and start < %(hour_from)s)
    or (grain = 'minute' and start >= %(hour_to)s and start < %(minute_to)s)
)

-- name: series
select version, start, requests, errors, sketches
from traffic_window
where model = %(model)s and version = any(%(versions)s) and grain = %(grain)s
    and start >= %(since)s and start < %(until)s
order by start, version

-- name: series_of_figures
select version, start, requests, errors,
       (sketches - 'chosen') || '{"features": {}, "new_words": {"counts": {}, "error": 0}}' as sketches
from traffic_window
where model = %(model)s and version = any(%(versions)s) and grain = %(grain)s
    and start >= %(since)s and start < %(until)s
order by start, version

-- name: profiles
select model, number, profile
from version
where (model, number) in (select * from unnest(%(models)s::text[], %(numbers)s::int[]))

-- name: drop_windows
-- Minutes serve the last days' charts; hours and days hold the same counts for longer.
delete from traffic_window
where (grain = 'minute' and start < now() - make_interval(days => %(minute_days)s))
    or (grain = 'hour' and start < now() - make_interval(days => %(hour_days)s))

-- name: drop_words
-- Of the last days that became too old; those before have none any more
update traffic_window set sketches = jsonb_set(sketches, '{new_words}', '{"counts": {}, "error": 0}')
where start < now() - make_interval(days => %(days)s) and start >= now() - make_interval(days => %(days)s + 7)
    and sketches #> '{new_words,counts}' <> '{}'

-- name: drop_batches
delete from event_batch where windowed_at < now() - interval '7 days'
