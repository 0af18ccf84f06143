-- name: corrections
select e.messages, f.correction
from request_event e join feedback f on f.request_at = e.at and f.request_id = e.id
where e.subject = %(subject)s and e.messages is not null and f.correction is not null

-- name: lock
-- Batches that are being stored end first, and none begins until this is over
lock table erasure in exclusive mode

-- name: note
insert into erasure (subject, actor, reason) values (%(subject)s, %(actor)s, %(reason)s) returning at

-- name: theirs
-- Their requests, and what was asked again for them: copies and replays name the request they are of
create temporary table theirs on commit drop as
with own as (select id, at from request_event where subject = %(subject)s)
select id, at from own
union
select e.id, e.at from request_event e join own on e.client_request_id = own.id::text

-- name: strip_feedback
update feedback f set correction = null, label = null
from theirs t
where f.request_at = t.at and f.request_id = t.id and (f.correction is not null or f.label is not null)

-- name: strip_events
update request_event e set messages = null, answer = null, error = null, client_request_id = null,
    subject = 'erased'
from theirs t where e.at = t.at and e.id = t.id
