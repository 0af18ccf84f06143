-- name: begin
insert into rollout (model, version, champion, plan, actor, reason)
values (%(model)s, %(version)s, %(champion)s, %(plan)s, %(actor)s, %(reason)s)

-- name: running
select * from rollout where model = %(model)s and state = 'running'

-- name: all_running
select model from rollout where state = 'running' order by id

-- name: lock
select * from rollout where model = %(model)s and state = 'running' for update

-- name: newest
select * from rollout where model = %(model)s order by id desc limit 1

-- name: note
update rollout set said = %(said)s, findings = %(findings)s, seen_at = clock_timestamp() where id = %(id)s

-- name: advance
update rollout set step = step + 1, step_at = clock_timestamp() where id = %(id)s

-- name: end
update rollout set state = %(state)s, ended_at = clock_timestamp() where id = %(id)s
