-- name: held_leases
select name, holder, token, clock_timestamp() - acquired_at as held from lease where expires_at > clock_timestamp()

-- name: end_lease
update lease set expires_at = clock_timestamp() where name = %(name)s and token = %(token)s

-- name: living_flow_runs
select flow_run_id
from run join lease on lease.name = 'run:' || run.model and lease.token = run.token
where run.state = 'running' and run.flow_run_id is not null and lease.expires_at > clock_timestamp()

-- name: unfinished_flow_runs
select flow_run_id from run where state = 'running' and flow_run_id is not null
