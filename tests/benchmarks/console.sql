-- name: again
-- The hour's events once more, at the same times
insert into request_event (
    id, at, batch, model, version, slot, key_id, client_request_id, status, error, stream, prompt_tokens,
    completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject, messages, answer)
select (left(replace(id::text, '-', ''), 13) || right(md5(random()::text), 3) || 'a' || right(md5(random()::text), 15))::uuid,
    at, '00000000-0000-0000-0000-000000000001', model, version, slot, key_id, client_request_id, status, error, stream,
    prompt_tokens, completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject,
    messages, answer
from request_event where batch <> '00000000-0000-0000-0000-000000000001'

-- name: batch_again
insert into event_batch (id, replica, rows)
select batch, batch, count(*) from request_event
where batch = '00000000-0000-0000-0000-000000000001' group by batch

-- name: events_before
-- The last hour's events, so many hours earlier; an event's id has its time
insert into request_event (
    id, at, batch, model, version, slot, key_id, client_request_id, status, error, stream, prompt_tokens,
    completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject, messages, answer)
select (lpad(to_hex((1000 * extract(epoch from at - make_interval(hours => %(hours)s)))::bigint), 12, '0')
        || right(replace(id::text, '-', ''), 20))::uuid,
    at - make_interval(hours => %(hours)s), batch, model, version, slot, key_id, client_request_id, status, error, stream,
    prompt_tokens, completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, subject,
    messages, answer
from request_event where at >= (select max(at) from request_event) - interval '55 minutes'

-- name: feedback_before
insert into feedback (request_id, request_at, model, version, at, scored_at, key_id, score, label, correction, similarity)
select (lpad(to_hex((1000 * extract(epoch from request_at - make_interval(hours => %(hours)s)))::bigint), 12, '0')
        || right(replace(request_id::text, '-', ''), 20))::uuid,
    request_at - make_interval(hours => %(hours)s), model, version, at - make_interval(hours => %(hours)s),
    scored_at - make_interval(hours => %(hours)s), key_id, score,
    label, correction, similarity
from feedback where request_at >= (select max(request_at) from feedback) - interval '55 minutes'

-- name: windows_before
insert into traffic_window (model, version, start, grain, requests, errors, sketches)
select model, version, start - make_interval(hours => %(hours)s), grain, requests, errors, sketches
from traffic_window
where grain = 'minute'
    and start >= (select max(start) from traffic_window where grain = 'minute') - interval '55 minutes'

-- name: minutes
select model, version, start, requests, errors, sketches from traffic_window
where grain = 'minute' and start >= %(day)s and start < %(day)s::timestamptz + interval '1 day'

-- name: some_request
-- In the middle of the month
select id, at from request_event where at >= now() - interval '15 days' and status = 200 order by at limit 1
