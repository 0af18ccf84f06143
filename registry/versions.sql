-- name: ensure_model
insert into model (name) values (%(model)s) on conflict (name) do nothing

-- name: insert
insert into version (model, number, bundle_digest, base_digest, dataset_digest, method, study, run_id, mlflow_run_id,
                     mlflow_model_id, manifest, metrics, evaluation, gate, profile, imported_by, decision)
values (%(model)s, %(number)s, %(bundle_digest)s, %(base_digest)s, %(dataset_digest)s, %(method)s, %(study)s,
        %(run_id)s, %(mlflow_run_id)s, %(mlflow_model_id)s, %(manifest)s, %(metrics)s, %(evaluation)s, %(gate)s,
        %(profile)s, %(imported_by)s, (select body ->> 'decision' from evidence where digest = %(gate)s))
on conflict do nothing

-- name: get
select v.model, v.number, v.created_at, v.bundle_digest, v.base_digest, v.dataset_digest, v.method, v.study, v.run_id,
       v.mlflow_run_id, v.mlflow_model_id, v.manifest, j.metrics, j.evaluation, j.gate, v.profile
from version v join judged j using (model, number) where v.model = %(model)s and v.number = %(number)s

-- name: by_run
select model, number, created_at, bundle_digest, base_digest, dataset_digest, method, study, run_id, mlflow_run_id,
       mlflow_model_id, manifest, metrics, evaluation, gate, profile
from version where model = %(model)s and run_id = %(run_id)s

-- name: made_here
-- The version that a run of ours made of a bundle
select v.model, v.number, v.created_at, v.bundle_digest, v.base_digest, v.dataset_digest, v.method, v.study, v.run_id,
       v.mlflow_run_id, v.mlflow_model_id, v.manifest, j.metrics, j.evaluation, j.gate, v.profile
from version v join judged j using (model, number) join run r on r.id = v.run_id
where v.model = %(model)s and v.bundle_digest = %(digest)s order by v.number limit 1

-- name: list
-- What `judged` says, without reading each version twice as a join with it would
select v.number as version, v.created_at, v.base_id as base, v.method, coalesce(j.metrics, v.metrics) as metrics,
       coalesce(j.decision, v.decision) as gate, v.dataset_digest as dataset, v.study
from version v
left join (
    select distinct on (number) number, metrics, decision from judgement
    where model = %(model)s order by number, id desc
) j using (number)
where v.model = %(model)s order by v.number

-- name: models
select m.name as model, m.created_at, coalesce(d.generation, 0) as generation, d.champion, d.challenger,
       coalesce(d.challenger_share, 0) as challenger_share, d.shadow,
       v.versions
from model m left join deployment d on d.model = m.name
    join (select model, count(*) as versions from version group by model) v on v.model = m.name
order by m.name

-- name: model_exists
select 1 as yes from model where name = %(model)s

-- name: dataset_exists
select 1 as yes from dataset where digest = %(digest)s

-- name: deleted
select actor, reason from deletion where model = %(model)s and number = %(number)s
