-- name: version
select v.profile, m.settings from version v join model m on m.name = v.model
where v.model = %(model)s and v.number = %(version)s

-- name: versions_with_traffic
select distinct version from traffic_window
where model = %(model)s and grain = 'day' and start >= %(day_from)s and start < %(until)s
order by version

-- name: feedback
-- Feedback is given after its request, so the index on `at` bounds what is read.
with given as (
    -- What reviewers correct was chosen for being doubtful, and when they do says nothing of when it was scored
    select case when reviewer is null then similarity end as similarity,
           case when scored_at >= %(since)s then score end as score
    from feedback
    where model = %(model)s and version = %(version)s and at >= %(since)s
        and request_at >= %(since)s and request_at <= %(until)s
)
select
    (select jsonb_object_agg(bin, n) from (
        select width_bucket(similarity, %(similarity)s::float8[]) as bin, count(*) as n
        from given where similarity is not null group by 1) bins) as similarity,
    (select jsonb_object_agg(bin, n) from (
        select width_bucket(score, %(score)s::float8[]) as bin, count(*) as n
        from given where score is not null group by 1) bins) as score

-- name: earlier_scores
select jsonb_object_agg(bin, n) as score from (
    select width_bucket(score, %(edges)s::float8[]) as bin, count(*) as n
    from (
        select score from feedback
        where model = %(model)s and scored_at < %(since)s and score is not null
        order by scored_at desc limit %(most)s) newest
    group by 1) bins

-- name: put_verdict
insert into verdict (id, model, version, since, until, verdict, body, ratios)
values (%(id)s, %(model)s, %(version)s, %(since)s, %(until)s, %(verdict)s, %(body)s, %(ratios)s)

-- name: last_verdict
select id, at, verdict, body from verdict
where model = %(model)s and version = %(version)s order by at desc limit 1

-- name: drop_verdicts
delete from verdict v where at < now() - make_interval(days => %(days)s)
    and not exists (select from retrain_request r where r.verdict = v.id)
