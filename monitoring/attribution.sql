-- name: earlier_scores
-- Of one version, before a time
select jsonb_object_agg(bin, n) as score from (
    select width_bucket(score, %(edges)s::float8[]) as bin, count(*) as n
    from (
        select score from feedback
        where model = %(model)s and version = %(version)s and scored_at < %(since)s and score is not null
        order by scored_at desc limit %(most)s) newest
    group by 1) bins

-- name: said
-- What people said of a version's answers, in the order in which they were given, or in which people said it
select case when %(as_given)s then coalesce(scored_at, at) else request_at end as at,
       case when scored_at >= %(since)s then score end as score,
       case when reviewer is null then similarity end as similarity
from feedback
where model = %(model)s and version = %(version)s and at >= %(since)s
    and request_at >= %(since)s and request_at <= %(until)s
order by at desc limit %(most)s

-- name: answered
-- The newest answers of a version, among the newest requests of its model
select id, features
from (
    select id, version, status, features from request_event
    where model = %(model)s and at >= %(began)s and at <= %(until)s
    order by at desc limit %(among)s) newest
where version = %(version)s and status = 200
limit %(most)s

-- name: disliked
select request_id as id from feedback
where model = %(model)s and version = %(version)s and at >= %(began)s
    and request_at >= %(since)s and request_at <= %(until)s and (score < 0 or similarity < 0.5)
order by least(score, similarity), request_at desc limit %(most)s
