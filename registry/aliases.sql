-- name: open_models
select model, max(attempts) as attempts from outbox
where done_at is null and kind = 'mlflow_aliases' and next_attempt_at <= clock_timestamp()
group by model order by min(next_attempt_at) limit %(limit)s

-- name: lock_model
select pg_try_advisory_xact_lock(hashtextextended('mlflow_aliases:' || %(model)s, 0)) as locked

-- name: newest
select max(id) as id from outbox where model = %(model)s and kind = 'mlflow_aliases' and done_at is null

-- name: gates
-- Of versions that were judged again; the others have what they were registered with.
select distinct on (number) number, decision from judgement where model = %(model)s order by number, id desc

-- name: done
update outbox set done_at = clock_timestamp(), attempts = attempts + 1, error = %(error)s
where model = %(model)s and kind = 'mlflow_aliases' and done_at is null and id <= %(newest)s

-- name: postpone
update outbox
set attempts = attempts + 1, error = %(error)s,
    next_attempt_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where model = %(model)s and kind = 'mlflow_aliases' and done_at is null and id <= %(newest)s

-- name: postpone_all
-- Each by what its own attempts earned it.
update outbox
set attempts = attempts + 1, error = %(error)s,
    next_attempt_at = greatest(
        next_attempt_at, clock_timestamp() + make_interval(secs => least(300, power(2, least(attempts, 9)))))
where kind = 'mlflow_aliases' and done_at is null

-- name: drop_old
delete from outbox where done_at < now() - make_interval(days => %(days)s)

-- name: enqueue_all
insert into outbox (kind, model)
select 'mlflow_aliases', d.model from deployment d
where d.generation > 0 and not exists (
    select 1 from outbox o where o.model = d.model and o.kind = 'mlflow_aliases' and o.done_at is null)
