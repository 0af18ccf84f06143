-- name: kept
-- What people asked the champion, with what it said, newest first; each question once
select * from (
    select distinct on (messages) id, messages, answer, latency_ms::float8 as latency_ms, completion_tokens, at
    from request_event
    where model = %(model)s and version = %(champion)s and slot = 'champion' and status = 200
        and at >= %(since)s and at < %(until)s and messages is not null and answer is not null
    order by messages, at desc) as each
order by at desc limit %(limit)s

-- name: copies
-- What a shadow said to copies of requests, beside what the client was told; not those for which there was no time (429,
-- or 499 when the gateway ended), since that tells nothing about the version
select o.id, o.messages, o.answer, o.latency_ms::float8 as latency_ms, o.completion_tokens,
       s.answer as now, s.latency_ms::float8 as now_ms, s.completion_tokens as now_tokens, s.status, s.error
from request_event s join request_event o on o.id::text = s.client_request_id and o.at <= s.at
where s.model = %(model)s and s.version = %(version)s and s.slot = 'shadow'
    and s.at >= %(since)s and s.at < %(until)s
    and s.status not in (429, 499)
    and o.model = %(model)s and o.version = %(champion)s and o.at >= %(since)s - interval '1 hour' and o.status = 200
order by s.at desc limit %(limit)s
