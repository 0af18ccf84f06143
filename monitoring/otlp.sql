-- name: waiting
select id, first_at, last_at
from (
    select id, first_at, last_at, sum(rows) over (order by created_at, id) - rows as before
    from (select * from event_batch where to_export order by created_at limit 500) oldest
) waiting
where before < %(rows)s

-- name: events
-- Neither text nor people: of an error only the code that our own answers begin with; events without a key are those of
-- other gateways, whose words are anybody's.
select id, model, version, slot, key_id, status, stream, prompt_tokens, completion_tokens, ttft_ms, latency_ms, cost_usd,
    finish_reason, case when key_id is not null then substring(error from '^([a-z][a-z_]*): ') end as error_code
from request_event
where batch = any(%(batches)s) and at between %(since)s and %(until)s

-- name: taken
update event_batch set to_export = false where id = any(%(batches)s)
