-- name: wait_for_erasures
-- Erasures that run end first (monitoring/erasure.sql), so that none of them misses these rows
lock table erasure in row share mode

-- name: may_be_erased
-- Whether somebody was erased since, whose these events may be
select exists (select from erasure where at >= %(first_at)s) as yes

-- name: copy
copy request_event (
    id, at, batch, model, version, slot, key_id, client_request_id, status, error, stream, prompt_tokens,
    completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject, messages, answer
) from stdin (format binary)

-- name: make_stage
create temporary table if not exists stage (like request_event) on commit delete rows

-- name: copy_to_stage
copy stage (
    id, at, batch, model, version, slot, key_id, client_request_id, status, error, stream, prompt_tokens,
    completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject, messages, answer
) from stdin (format binary)

-- name: insert_events
insert into request_event (
    id, at, batch, model, version, slot, key_id, client_request_id, status, error, stream, prompt_tokens,
    completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject, messages, answer
)
select
    id, s.at, batch, model, version, slot, key_id, case when not gone then client_request_id end, status, error, stream,
    prompt_tokens, completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features,
    case when gone then 'erased' else subject end, case when not gone then messages end, case when not gone then answer end
from stage s
-- What was on its way when its sender was erased is stored without whose it was and what it said
cross join lateral (select exists (select from erasure e where e.subject = s.subject and e.at >= s.at) as gone) as erased
on conflict do nothing

-- name: insert_batch
insert into event_batch (id, replica, rows, first_at, last_at)
values (%(id)s, %(replica)s, %(rows)s, %(first_at)s, %(last_at)s)

-- name: lock_partitions
select pg_advisory_xact_lock(hashtext('tunesmith request_event partitions'))

-- name: partitions
select c.relname as name
from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'request_event'::regclass

-- name: soon
set local lock_timeout = '2s'

-- name: today
select (now() at time zone 'utc')::date as today
