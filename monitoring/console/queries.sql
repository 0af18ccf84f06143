-- name: open_alerts
select count(*) as open from alert where closed_at is null

-- name: models
select m.name, m.created_at, coalesce(d.generation, 0) as generation, d.champion, d.challenger, d.challenger_share,
       d.shadow, s.serves_since, v.versions, a.alerts, a.urgent, a.worst, b.behind, t.verdict, t.verdict_at,
       r.run_kind, r.run_state, r.run_started_at, c.cost_today
from model m
left join deployment d on d.model = m.name
left join lateral (
    select at as serves_since from ledger where model = m.name and slot = 'champion' order by generation desc limit 1
    ) s on true
cross join lateral (select count(*) as versions from version where model = m.name) v
cross join lateral (
    -- The most urgent are told first: what a gateway cannot serve is so whatever its severity
    select count(*) as alerts, min(rank) as urgent,
           (array_agg(jsonb_build_object('id', id, 'rule', rule, 'cause', cause) order by rank, opened_at desc))[1] as worst
    from (
        select *, case when severity = 'critical' or rule = 'not serving' then 0 when severity = 'warning' then 1
                       else 2 end as rank
        from alert where model = m.name and closed_at is null) ranked) a
cross join lateral (
    select count(*) > 0 as behind from replica
    where model = m.name and seen_at > now() - interval '1 minute' and not ready) b
left join lateral (
    select verdict, at as verdict_at
    from verdict where model = m.name and version = d.champion order by at desc limit 1) t on true
left join lateral (
    select kind as run_kind, state as run_state, started_at as run_started_at
    from run where model = m.name order by started_at desc limit 1) r on true
cross join lateral (
    -- By version, whose index begins with it
    select sum((w.sketches -> 'numbers' ->> 3)::float8 / 1e9) as cost_today
    from version v
    join traffic_window w on w.model = v.model and w.version = v.number
        and w.grain = 'day' and w.start = date_trunc('day', now(), 'UTC')
    where v.model = m.name) c
where %(model)s::text is null or m.name = %(model)s
order by m.name

-- name: model_settings
select name, settings from model order by name

-- name: datasets
select d.*, v.versions
from dataset d
cross join lateral (
    select jsonb_agg(jsonb_build_object('model', model, 'number', number) order by model, number) as versions
    from version where dataset_digest = d.digest) v
order by d.created_at desc limit 200

-- name: model_names
select name from model order by name

-- name: versions
select v.number, v.created_at, v.bundle_digest, v.base_digest, v.dataset_digest, v.method, v.study, v.run_id,
       v.mlflow_run_id, j.metrics, j.evaluation, b.id as base, b.parameters,
       g.body as gate, e.body -> 'metrics' as estimates, (e.body ->> 'rows')::int as rows
from version v
join judged j using (model, number)
join base b on b.digest = v.base_digest
left join evidence g on g.digest = j.gate
left join evidence e on e.digest = j.evaluation
where v.model = %(model)s and (%(number)s::int is null or v.number = %(number)s)
order by v.number desc

-- name: numbers
select number from version where model = %(model)s order by number desc

-- name: version
select v.*, b.id as base, b.revision, b.parameters, b.dtype, j.gate as judged_gate, g.body as gate_body,
       e.body as evaluation_body, s.counts, s.sources, s.parent as dataset_parent
from version v
join judged j using (model, number)
join base b on b.digest = v.base_digest
left join evidence g on g.digest = j.gate
left join evidence e on e.digest = j.evaluation
left join dataset s on s.digest = v.dataset_digest
where v.model = %(model)s and v.number = %(number)s

-- name: studies
select s.name, s.model, s.stopped_by, s.created_at, s.updated_at, (s.spec ->> 'trials')::int as wanted,
       j.*, r.id as run, r.mlflow_run_id, case when s.state <> 'running' or exists (
           select from run q join lease l on l.name = 'run:' || q.model and l.token = q.token and l.expires_at > now()
           where q.study = s.name)
       then s.state else 'interrupted' end as state
from study s
cross join lateral (
    select count(distinct trial) filter (where clone_of is null) as trials,
           count(*) filter (where state = 'failed') as failed,
           count(*) filter (where state = 'running') as running, min(value) as best_value,
           (array_agg(trial order by value) filter (where value is not null))[1] as best_trial,
           (array_agg(steps order by value) filter (where value is not null))[1] as best_steps
    from rung_job where study = s.name) j
left join lateral (
    select id, mlflow_run_id from run where study = s.name order by started_at desc limit 1) r on true
order by s.created_at desc limit 200

-- name: study
select s.name, s.model, s.spec, s.stopped_by, s.created_at, s.updated_at, s.best, s.seconds_left,
       case when s.state <> 'running' or exists (
           select from run q join lease l on l.name = 'run:' || q.model and l.token = q.token and l.expires_at > now()
           where q.study = s.name)
       then s.state else 'interrupted' end as state,
       count(distinct j.trial) filter (where j.clone_of is null) as trials,
       count(distinct j.trial) filter (where j.clone_of is not null) as variants, count(j.trial) filter (where j.state = 'done') as rungs,
       count(j.trial) filter (where j.state = 'failed') as failed, coalesce(sum(j.tokens), 0)::bigint as tokens,
       coalesce(sum(j.seconds), 0) as seconds, min(j.value) as best_value
from study s left join rung_job j on j.study = s.name
where s.name = %(study)s
group by s.name

-- name: trials
-- A trial's value is its lowest, by which the winner is chosen.
select trial, max(steps) filter (where value is not null) as steps, min(value) as value,
       (array_agg(steps order by value) filter (where value is not null))[1] as value_at,
       (array_agg(params order by rung))[1] as params, coalesce(sum(tokens), 0)::bigint as tokens,
       coalesce(sum(seconds), 0) as seconds, bool_or(state = 'failed') as failed, max(clone_of) as clone_of,
       (array_agg(error order by rung desc) filter (where state = 'failed'))[1] as error,
       array_agg(value order by rung) filter (where value is not null) as course,
       array_agg(steps order by rung) filter (where value is not null) as measured_at
from rung_job where study = %(study)s
group by trial
order by min(value) nulls last, trial

-- name: measures
-- What trials may be weighed by, as they stood after each rung (tuning/objectives.py).
select *, 1000 * training_seconds / nullif(training_tokens, 0) as step_ms_per_token
from (
    select trial, steps, value as loss, adapter_parameters, latency_ms,
           sum(seconds) over (partition by trial order by rung) as training_seconds,
           (sum(tokens) over (partition by trial order by rung))::bigint as training_tokens
    from rung_job where study = %(study)s) j
where loss is not null
order by steps, trial

-- name: run_of_study
select r.id, r.state, r.version, r.mlflow_run_id, s.output -> 'importances' as importances
from run r left join stage s on s.run_id = r.id and s.name = 'search'
where r.study = %(study)s
order by r.started_at desc limit 1

-- name: alerts_open
select * from alert where closed_at is null and (%(model)s::text is null or model = %(model)s)
order by array_position(array['critical', 'warning', 'info'], severity), opened_at desc
limit 200

-- name: alert
select * from alert where id = %(id)s

-- name: examples
select e.id, left(e.messages -> -1 ->> 'content', 300) as asked, e.features,
       (select dataset_digest from version where model = %(model)s and number = %(version)s) as dataset
from request_event e
join unnest(%(ids)s::uuid[], %(ats)s::timestamptz[]) as wanted (id, at) on e.at = wanted.at and e.id = wanted.id

-- name: alerts_closed
select * from alert where closed_at is not null order by closed_at desc limit 50

-- name: retrains
select q.*, v.version, v.verdict as verdict_said
from retrain_request q left join verdict v on v.id = q.verdict
where %(model)s::text is null or q.model = %(model)s
order by q.at desc limit 20

-- name: windows
-- Features and words are left behind: charts of traffic do not need them, and they are most of a sketch.
select version, start, requests, errors,
       (sketches - 'chosen') || '{"features": {}, "new_words": {"counts": {}, "error": 0}}' as sketches
from traffic_window
where model = %(model)s and grain = %(grain)s and start >= %(since)s and start < %(until)s
order by start, version

-- name: replicas_behind
select message, generation, seen_at from replica
where model = %(model)s and seen_at > now() - interval '1 minute' and not ready

-- name: first_window
-- The hours say about when; only of a young model the minutes are looked at.
select case when min(h.start) > now() - interval '8 hours'
            then (select min(m.start) from traffic_window m where m.model = %(model)s and m.grain = 'minute')
            else min(h.start) end as start
from traffic_window h where h.model = %(model)s and h.grain = 'hour'

-- name: heat
-- Of each feature (its number from 1, or its name in verdicts of earlier releases) how far beyond its threshold it was,
-- at most, in each of the columns between two times
select feature, name,
       least(%(columns)s, width_bucket(extract(epoch from at), extract(epoch from %(since)s::timestamptz),
             extract(epoch from %(until)s::timestamptz), %(columns)s)) - 1 as place, max(ratio) as ratio
from (
    select v.at, r.feature, null as name, r.ratio::float8 as ratio
    from verdict v cross join lateral unnest(v.ratios) with ordinality r (ratio, feature)
    where v.model = %(model)s and v.version = %(version)s and v.at >= %(since)s and r.ratio is not null
    union all
    select v.at, null, f ->> 'name',
           case when (f ->> 'threshold')::float8 > 0 then (f ->> 'value')::float8 / (f ->> 'threshold')::float8
                when (f ->> 'value')::float8 > 0 then 'infinity' else 0 end
    from verdict v cross join lateral jsonb_array_elements(v.body -> 'features') f
    where v.model = %(model)s and v.version = %(version)s and v.at >= %(since)s and v.ratios is null
        and f ->> 'value' is not null and f ->> 'threshold' is not null) each
group by 1, 2, 3

-- name: judged
-- How often, and the last time that features were compared
select count(*) as n from verdict where model = %(model)s and version = %(version)s and at >= %(since)s

-- name: last_compared
select at, since, until, body from verdict
where model = %(model)s and version = %(version)s and at >= %(since)s and jsonb_array_length(body -> 'features') > 0
order by at desc limit 1

-- name: last_verdicts
select v.number as version, t.verdict, t.at
from version v
cross join lateral (
    select verdict, at from verdict where model = v.model and version = v.number order by at desc limit 1) t
where v.model = %(model)s

-- name: requests
select r.id, r.at, r.model, r.version, r.slot, r.status, r.error, r.stream, r.prompt_tokens, r.completion_tokens,
       r.ttft_ms, r.latency_ms, r.cost_usd, r.finish_reason, f.score, f.label, f.correction, f.similarity,
       left(r.messages -> -1 ->> 'content', 300) as asked

-- name: of_all
from request_event r left join feedback f on f.request_id = r.id and f.request_at = r.at

-- name: of_rated
-- Begins at the feedback, which few requests may have, in its own order
from (
    select * from feedback
    where request_at >= %(since)s
      and (%(model)s::text is null or model in (%(model)s, ''))  -- empty until its request is there
      and (%(before_at)s::timestamptz is null
           or (request_at, request_id) < (%(before_at)s::timestamptz, %(before_id)s::uuid))
      and (%(feedback)s = 'any'
           or (%(feedback)s = 'corrected' and correction is not null)
           or (%(feedback)s = 'negative' and score < 0))) f
cross join lateral (
    select * from request_event e where e.at = f.request_at and e.id = f.request_id offset 0) r

-- name: asked_for
where r.at >= %(since)s
  and (%(until)s::timestamptz is null or r.at < %(until)s)
  and (%(before_at)s::timestamptz is null or (r.at, r.id) < (%(before_at)s::timestamptz, %(before_id)s::uuid))
  and (%(model)s::text is null or r.model = %(model)s)
  and (%(version)s::int is null or r.version = %(version)s)
  and (%(slot)s::text is null or r.slot = %(slot)s)
  and (%(status)s::text is null
       or (%(status)s = 'ok' and r.status < 400) or (%(status)s = 'error' and r.status >= 400))

-- name: newest_first
order by r.at desc, r.id desc limit %(limit)s

-- name: newest_rated_first
order by f.request_at desc, f.request_id desc limit %(limit)s

-- name: last_of_version
-- Until when a version has requests at most: null where it has some in the last hour, or where windows are behind. What
-- is no traffic has none, and is counted by key
select case when not exists (
    select from request_event where model = %(model)s and version = %(version)s and at > now() - interval '1 hour'
) and not exists (
    select from event_batch where windowed_at is null and created_at < now() - interval '10 minutes'
) then interval '1 day' + coalesce(greatest(
    (select max(start) from traffic_window where model = %(model)s and version = %(version)s and grain = 'day'),
    (select max(day)::timestamp at time zone 'UTC' from key_usage where model = %(model)s and version = %(version)s)
), timestamptz '2000-01-01 00:00:00Z') end as until

-- name: request
select r.*, b.created_at as recorded_at, b.windowed_at, k.name as key_name,
       f.at as feedback_at, f.score, f.review, f.label, f.correction, f.similarity, fk.name as feedback_by,
       rk.name as reviewed_by, f.reviewer is not null as reviewed
from request_event r
left join event_batch b on b.id = r.batch
left join api_key k on k.id = r.key_id
left join feedback f on f.request_id = r.id
left join api_key fk on fk.id = f.key_id
left join api_key rk on rk.id = f.reviewer
where r.id = %(id)s and r.at between %(since)s and %(until)s

-- name: disliked
select e.id, e.at, e.version, e.messages, e.answer, f.score, f.label
from feedback f join request_event e on e.at = f.request_at and e.id = f.request_id
where f.model = %(model)s and f.at > %(since)s and f.score < 0 and f.review is null and f.correction is null
    and e.answer is not null
order by f.at desc limit %(limit)s

-- name: unsure
-- Of the newest only: a queue is for what happens now, and need not read a month
select e.id, e.at, e.version, e.messages, e.answer, null::float8 as score, null as label
from (
    select * from request_event where model = %(model)s and at > %(since)s order by at desc limit %(newest)s) e
where e.status = 200 and e.answer is not null and e.slot in ('champion', 'challenger')
    and not exists (select from feedback f where f.request_id = e.id)
order by nullif(e.features[%(place)s], 'NaN') nulls last, e.at desc limit %(limit)s

-- name: runs
select id, model, kind, state, config_path, study, version, flow_run_id, mlflow_run_id, error, started_at,
       updated_at, finished_at,
       (select jsonb_object_agg(s.name, s.seconds) from stage s where s.run_id = run.id) as stages,
       exists (select from study where study.name = run.study) as searched
from run
where (%(model)s::text is null or model = %(model)s)
order by started_at desc limit 100

-- name: run
select run.* from run where id = %(id)s

-- name: stages
select name, output, seconds, created_at from stage where run_id = %(id)s order by created_at

-- name: profile
select profile from version where model = %(model)s and number = %(number)s

-- name: judged_over
select settings -> 'monitoring' ->> 'window' as span from model where name = %(model)s
