-- name: wanted_bases
-- What serves comes first, then the base of the newest version, which is likely to serve next.
select base_digest
from (
    select v.base_digest, 0 as rank, d.updated_at as at
    from deployment d
    join version v on v.model = d.model and v.number in (d.champion, d.challenger, d.shadow)
    where not v.manifest ? 'hosted'
    union all
    (select base_digest, 1, created_at from version where not manifest ? 'hosted' order by created_at desc limit 1)
) wanted
group by base_digest
order by min(rank), max(at) desc
limit %(limit)s

-- name: has_keys
select exists (select from api_key) as has
