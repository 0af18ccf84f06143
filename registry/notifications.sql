-- name: open
select n.id, n.attempts, n.name, n.message, l.model, l.generation, l.at, l.actor, l.action, l.slot, l.from_version,
       l.to_version, l.share, l.reason, l.forced, l.evidence, l.previous_hash, l.hash
from notification n left join ledger l on l.model = n.model and l.generation = n.generation
where n.target = %(target)s and n.done_at is null and n.next_attempt_at <= clock_timestamp()
    -- What came later waits behind what failed
    and not exists (select from notification before where before.target = n.target and before.done_at is null
                    and before.id < n.id and before.next_attempt_at > clock_timestamp())
order by n.id limit %(limit)s for update of n skip locked

-- name: enqueue
insert into notification (model, name, message, target)
select %(model)s, %(name)s, %(message)s, target from unnest(array['webhook', 'slack']) as target

-- name: done
update notification set done_at = clock_timestamp(), attempts = attempts + 1, error = null where id = %(id)s

-- name: give_up
update notification set done_at = clock_timestamp(), attempts = attempts + 1, error = %(error)s where id = %(id)s

-- name: postpone
-- One address: what waits behind the one that failed waits too, and the order stays.
update notification
set attempts = attempts + (id = %(id)s)::int, error = case when id = %(id)s then %(error)s else error end,
    next_attempt_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s and done_at is null

-- name: nobody
update notification set done_at = clock_timestamp(), error = 'no address was set'
where target = %(target)s and done_at is null

-- name: drop_old
delete from notification where done_at < now() - make_interval(days => %(days)s)
