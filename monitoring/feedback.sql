-- name: is_ours
select 1 as yes from request_event where at = %(at)s and id = %(id)s

-- name: by_client_id
-- Copies name the request that they are of
select id from request_event
where client_request_id = %(client_request_id)s and slot <> 'shadow' and at > now() - make_interval(days => %(days)s)
    and (%(key_id)s::text is null or key_id = %(key_id)s) and (%(model)s = '' or model = %(model)s)
order by at desc limit 1

-- name: put
-- The last write wins, field by field: a correction that follows a score does not erase it.
insert into feedback (request_id, request_at, model, key_id, reviewer, scored_at, score, review, label, correction)
values (%(request_id)s, %(request_at)s, %(model)s, %(key_id)s, %(reviewer)s, case when %(has_score)s then now() end,
        %(score)s, %(review)s, %(label)s, %(correction)s)
on conflict (request_id) do update set
    at = now(),
    key_id = case when %(reviewing)s then feedback.key_id else excluded.key_id end,
    reviewer = coalesce(excluded.reviewer, feedback.reviewer),
    scored_at = case when %(has_score)s then now() else feedback.scored_at end,
    score = case when %(has_score)s then excluded.score else feedback.score end,
    review = coalesce(excluded.review, feedback.review),
    label = case when %(has_label)s then excluded.label else feedback.label end,
    correction = case when %(has_correction)s then excluded.correction else feedback.correction end

-- name: join_events
select f.request_id, e.model, e.version, e.answer, f.correction
from feedback f join request_event e on e.at = f.request_at and e.id = f.request_id
where f.request_id = any(%(ids)s)

-- name: models_of
select e.id, e.model from request_event e
join unnest(%(ids)s::uuid[], %(ats)s::timestamptz[]) as wanted (id, at) on e.at = wanted.at and e.id = wanted.id

-- name: settle
update feedback set model = %(model)s, version = %(version)s, similarity = %(similarity)s where request_id = %(id)s

-- name: forget_erased
-- What was said about answers to somebody who was erased
update feedback f set correction = null, label = null
from request_event e
where f.request_id = any(%(ids)s) and e.at = f.request_at and e.id = f.request_id and e.subject = 'erased'
    and (f.correction is not null or f.label is not null)

-- name: unsettled
-- Of those that wait, whose request is there by now: any number of made-up ids is no hindrance
select f.request_id
from feedback f join request_event e on e.at = f.request_at and e.id = f.request_id
where f.model = '' and (%(late)s or f.at > now() - interval '10 minutes') limit %(limit)s

-- name: drop_old
delete from feedback where at < now() - make_interval(days => %(days)s)

-- name: summary
select count(*)::int as n, avg(score) as mean_score, count(correction)::int as corrections,
    avg(similarity) as mean_similarity
from feedback
where model = %(model)s and (%(version)s::int is null or version = %(version)s)
    and at >= %(since)s and request_at >= %(since)s and request_at <= %(until)s

-- name: usable_corrections
-- What a retraining could use and none has used yet: with kept text, given after the last one began.
-- Each is looked up, however many: to join them with all requests takes seconds on ten million of these
select count(*)::int as n from (
    select from (
        select request_at, request_id from feedback
        where model = %(model)s and correction is not null and (%(after)s::timestamptz is null or at > %(after)s)) f
    cross join lateral (
        select messages from request_event e where e.at = f.request_at and e.id = f.request_id offset 0) e
    where e.messages is not null limit %(most)s) usable
