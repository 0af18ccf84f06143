-- name: lock
select pg_advisory_xact_lock(hashtext('tunesmith retrain ' || %(model)s))

-- name: newest
select id, at, state, reason from retrain_request where model = %(model)s order by at desc limit 1

-- name: last_asked
select max(at) as at from retrain_request where model = %(model)s and state in ('asked', 'started')

-- name: running
select holder, acquired_at from lease where name = 'run:' || %(model)s and expires_at > clock_timestamp()

-- name: insert
insert into retrain_request (id, model, verdict, state, reason)
values (%(id)s, %(model)s, %(verdict)s, %(state)s, %(reason)s)

-- name: update_reason
update retrain_request set reason = %(reason)s where id = %(id)s

-- name: asked
-- What hinders the start stands behind the reason, after ' Waits: '.
select id, model, nullif(split_part(reason, ' Waits: ', 2), '') as error
from retrain_request where state = 'asked' order by at

-- name: waits
update retrain_request set reason = split_part(reason, ' Waits: ', 1) || ' Waits: ' || %(error)s
where id = %(id)s and state = 'asked'

-- name: started
update retrain_request
set state = 'started', flow_run_id = %(flow_run_id)s, reason = split_part(reason, ' Waits: ', 1)
where id = %(id)s and state = 'asked'

-- name: now
select now() as now
