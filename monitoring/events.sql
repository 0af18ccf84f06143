-- name: versions
select v.model, v.number, v.profile, m.settings
from version v join model m on m.name = v.model
where (v.model, v.number) in (select * from unnest(%(models)s::text[], %(numbers)s::int[]))
