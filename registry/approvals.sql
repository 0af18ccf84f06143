-- name: version
select v.bundle_digest, v.imported_by, j.gate as gate_digest, g.body as gate
from version v join judged j using (model, number) left join evidence g on g.digest = j.gate
where v.model = %(model)s and v.number = %(number)s

-- name: whose_key
select person from api_key where id = %(id)s

-- name: given
-- Of what a version was last judged by
select person, actor, role, reason, bundle_digest, at from approval a
where model = %(model)s and number = %(number)s and at > coalesce(
    (select max(j.at) from judgement j where j.model = a.model and j.number = a.number), '-infinity')
order by at, person

-- name: lock
select pg_advisory_xact_lock(hashtextextended('tunesmith approvals ' || %(model)s, 0))

-- name: give
insert into approval (model, number, person, actor, role, reason, bundle_digest)
values (%(model)s, %(number)s, %(person)s, %(actor)s, %(role)s, %(reason)s, %(bundle_digest)s) returning at
