-- name: ensure_model
insert into model (name) values (%(model)s) on conflict do nothing

-- name: save_model_settings
update model set settings = %(settings)s where name = %(model)s

-- name: unfinished
select id, study, flow_run_id, mlflow_run_id, version
from run
where model = %(model)s and kind = %(kind)s and fingerprint = %(fingerprint)s and state <> 'completed'
  and not exists (select from run later where later.model = run.model and later.state = 'completed'
                  and later.started_at > run.started_at)
order by started_at desc limit 1

-- name: begin
insert into run (id, model, kind, state, fingerprint, config, config_path, token, flow_run_id)
values (%(id)s, %(model)s, %(kind)s, 'running', %(fingerprint)s, %(config)s, %(config_path)s, %(token)s, %(flow_run_id)s)

-- name: resume
update run set state = 'running', token = %(token)s, flow_run_id = %(flow_run_id)s, error = null, finished_at = null,
    updated_at = now()
where id = %(id)s

-- name: stages
select name, output from stage where run_id = %(id)s

-- name: config
select config -> 'evaluation' as evaluation, config -> 'gates' as gates, config -> 'approvals' as approvals,
       config ->> 'on_underpowered' as on_underpowered, config -> 'monitoring' -> 'price' as price
from run where id = %(id)s

-- name: keep_stage
insert into stage (run_id, name, output, seconds) values (%(id)s, %(name)s, %(output)s, %(seconds)s)
on conflict (run_id, name) do nothing

-- name: note
update run set study = coalesce(%(study)s, study), mlflow_run_id = coalesce(%(mlflow_run_id)s, mlflow_run_id),
    version = coalesce(%(version)s, version), updated_at = now()
where id = %(id)s

-- name: end
update run set state = %(state)s, error = %(error)s, result = %(result)s, version = coalesce(%(version)s, version),
    updated_at = now(), finished_at = now()
where id = %(id)s and token = %(token)s

-- name: best_params
-- Of each of the model's last studies, those on this base first: what won, then what came furthest with the lowest
-- loss; the winners before the seconds
select top.params
from (
    select name, created_at, best -> 'params' as won, spec ->> 'base' = %(base)s as same from study
    where model = %(model)s and best is not null and name <> %(study)s
    order by created_at desc limit %(studies)s) s
cross join lateral (
    select params, row_number() over (order by params = s.won desc, rung desc, value) as place
    from (
        select distinct on (trial) params, rung, value from rung_job
        where study = s.name and value is not null order by trial, rung desc) trials
    order by place limit %(each)s) top
order by s.same desc, top.place, s.created_at desc
limit %(most)s

-- name: corrections
select distinct on (f.request_id) f.request_id, f.correction, e.messages
from feedback f join request_event e on e.id = f.request_id and e.at = f.request_at
where f.model = %(model)s and f.correction is not null and e.messages is not null
order by f.request_id

-- name: holder
select holder, token, clock_timestamp() - acquired_at as held from lease where name = %(name)s and expires_at > now()

-- name: free
update lease set expires_at = now() where name = %(name)s and token = %(token)s

-- name: latest
select id, kind, state, version, error, started_at, updated_at,
    (select array_agg(name order by created_at) from stage where run_id = run.id) as stages
from run where model = %(model)s order by started_at desc limit 1

-- name: result
select result from run where model = %(model)s and version = %(version)s and state = 'completed'
order by finished_at desc limit 1

-- name: model_settings
select settings from model where name = %(model)s
