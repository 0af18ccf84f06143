-- name: open
select n.id, n.attempts, l.model, l.generation, l.at, l.actor, l.action, l.slot, l.from_version, l.to_version, l.share,
       l.reason, l.forced, l.evidence, l.previous_hash, l.hash
from notification n join ledger l on l.model = n.model and l.generation = n.generation
where n.done_at is null and n.next_attempt_at <= clock_timestamp()
order by n.id limit %(limit)s for update of n skip locked

-- name: done
update notification set done_at = clock_timestamp(), attempts = attempts + 1, error = null where id = %(id)s

-- name: give_up
update notification set done_at = clock_timestamp(), attempts = attempts + 1, error = %(error)s where id = %(id)s

-- name: postpone
-- One address: what waits behind the one that failed waits too, and the order stays.
update notification
set attempts = attempts + (id = %(id)s)::int, error = case when id = %(id)s then %(error)s else error end,
    next_attempt_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where done_at is null

-- name: nobody
update notification set done_at = clock_timestamp(), error = 'no webhook was set' where done_at is null

-- name: drop_old
delete from notification where done_at < now() - make_interval(days => %(days)s)
