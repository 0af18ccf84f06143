-- name: lock
-- Batches that are being stored end first, and none begins until this is over
lock table erasure in exclusive mode

-- name: note
insert into erasure (subject, actor, reason) values (%(subject)s, %(actor)s, %(reason)s) returning at

-- name: corrections
select e.messages, f.correction
from request_event e join feedback f on f.request_at = e.at and f.request_id = e.id
where e.subject = %(subject)s and e.messages is not null and f.correction is not null

-- name: strip_feedback
update feedback f set correction = null, label = null
from request_event e
where e.subject = %(subject)s and f.request_at = e.at and f.request_id = e.id
    and (f.correction is not null or f.label is not null)

-- name: strip_events
update request_event set messages = null, answer = null, client_request_id = null, subject = null
where subject = %(subject)s
