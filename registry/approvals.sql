-- name: version
select v.bundle_digest, g.body as gate
from version v join judged j using (model, number) left join evidence g on g.digest = j.gate
where v.model = %(model)s and v.number = %(number)s

-- name: whose_key
select person from api_key where id = %(id)s

-- name: given
-- Of what a version was last judged by. One that gave two words at once is one person.
select person, actor, role, reason, bundle_digest, at from (
    select distinct on (person) * from approval a
    where model = %(model)s and number = %(number)s and at > coalesce(
        (select max(j.at) from judgement j where j.model = a.model and j.number = a.number), '-infinity')
    order by person, at) given
order by at, person

-- name: give
insert into approval (model, number, person, actor, role, reason, bundle_digest)
values (%(model)s, %(number)s, %(person)s, %(actor)s, %(role)s, %(reason)s, %(bundle_digest)s) returning at
