-- name: dataset
select model, created_at, counts, sources, parent from dataset where digest = %(digest)s

-- name: by_bundle
select model, number from version where bundle_digest = %(digest)s order by model, number

-- name: learned
-- The data sets that an adapter learned from, and those that the adapters did which it began from
with recursive line as (
    select v.dataset_digest, coalesce(v.manifest -> 'training' ->> 'init_bundle', s.spec ->> 'init_bundle') as began_from
    from version v left join study s on s.name = v.study where v.bundle_digest = %(bundle)s
    union
    select v.dataset_digest, coalesce(v.manifest -> 'training' ->> 'init_bundle', s.spec ->> 'init_bundle')
    from line l join version v on v.bundle_digest = l.began_from left join study s on s.name = v.study
)
select distinct dataset_digest as digest from line where dataset_digest is not null order by 1

-- name: datasets
select digest, model from dataset order by created_at

-- name: saw
-- Versions of these data sets, and, from those that learned from one, what began from their adapters, and so on.
with recursive maker as (
    select v.model, v.number, v.bundle_digest, v.dataset_digest,
           coalesce(v.manifest -> 'training' ->> 'init_bundle', s.spec ->> 'init_bundle') as began_from
    from version v left join study s on s.name = v.study
), saw as (
    select model, number, bundle_digest, dataset_digest, null::text as through,
           dataset_digest = any(%(learned)s) as learned
    from maker where dataset_digest = any(%(digests)s)
    union
    select m.model, m.number, m.bundle_digest, m.dataset_digest, s.model || ':' || s.number, true
    from saw s join maker m on m.began_from = s.bundle_digest
    where s.learned
)
select distinct on (s.model, s.number) s.model, s.number, s.dataset_digest, s.through,
       case s.number when d.champion then 'champion' when d.challenger then 'challenger' when d.shadow then 'shadow' end
           as serving
from saw s left join deployment d on d.model = s.model
-- what it did itself says more than where it began
order by s.model, s.number, s.through nulls first
