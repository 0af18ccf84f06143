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
    id, at, batch, model, version, slot, key_id, client_request_id, status, error, stream, prompt_tokens,
    completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject, messages, answer
from stage
on conflict do nothing

-- name: insert_batch
insert into event_batch (id, replica, rows) values (%(id)s, %(replica)s, %(rows)s)

-- name: lock_partitions
select pg_advisory_xact_lock(hashtext('tunesmith request_event partitions'))

-- name: partitions
select c.relname as name
from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'request_event'::regclass

-- name: today
select (now() at time zone 'utc')::date as today
