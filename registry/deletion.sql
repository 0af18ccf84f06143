-- name: needed_by_ledger
select exists (
    select from ledger where model = %(model)s and %(number)s in (from_version, to_version)) as needed

-- name: studies
-- Running ones, whose trials start from this bundle's adapter
select name from study where state = 'running' and spec ->> 'init_bundle' = %(digest)s order by name limit 1

-- name: note
insert into deletion (model, number, actor, reason, bundle_digest, mlflow_model_id, evaluation, gate)
values (%(model)s, %(number)s, %(actor)s, %(reason)s, %(bundle_digest)s, %(mlflow_model_id)s, %(evaluation)s, %(gate)s)
returning model, number, at, actor, reason, bundle_digest, mlflow_model_id

-- name: delete
delete from version where model = %(model)s and number = %(number)s

-- name: get
select model, number, at, actor, reason, bundle_digest, mlflow_model_id from deletion
where model = %(model)s and number = %(number)s

-- name: no_new_versions
-- Until the transaction ends, so that no version of this very bundle comes while it is removed
lock table version in share row exclusive mode

-- name: still_used
select exists (select from version where bundle_digest = %(digest)s) as used
