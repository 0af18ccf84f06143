-- name: wanted_bases
-- What serves comes first, then the base of the newest version, which is likely to serve next.
select base_digest
from (
    select v.base_digest, 0 as rank, d.updated_at as at
    from deployment d
    join version v on v.model = d.model and v.number in (d.champion, d.challenger, d.shadow)
    where not v.manifest ? 'hosted'
    union all  -- what a rollback would bring back
    select v.base_digest, 1, l.at
    from ledger l join version v on v.model = l.model and v.number = l.from_version
    where not v.manifest ? 'hosted' and l.slot = 'champion' and l.generation = (
        select max(generation) from ledger last where last.model = l.model and last.slot = 'champion')
    union all
    (select base_digest, 1, created_at from version where not manifest ? 'hosted' order by created_at desc limit 1)
) wanted
group by base_digest
order by min(rank), max(at) desc
limit %(limit)s

-- name: has_keys
select exists (select from api_key) as has
