-- name: dataset
select model, created_at, counts, sources, parent from dataset where digest = %(digest)s

-- name: by_bundle
select model, number from version where bundle_digest = %(digest)s order by model, number

-- name: learned
-- The data sets that an adapter learned from, and those that the adapters did which it began from; no data set of one
-- that was made elsewhere, or deleted
with recursive line as (
    select %(bundle)s::text as bundle, null::text as dataset_digest, %(bundle)s::text as began_from
    union
    select coalesce(v.model || ':' || v.number, l.began_from), v.dataset_digest,
           coalesce(v.manifest -> 'training' ->> 'init_bundle', s.spec ->> 'init_bundle')
    from line l left join version v on v.bundle_digest = l.began_from left join study s on s.name = v.study
    where l.began_from is not null
)
select dataset_digest as digest, min(bundle) as name from line
where bundle is distinct from %(bundle)s or dataset_digest is not null or began_from is distinct from %(bundle)s
group by dataset_digest, case when dataset_digest is null then bundle end order by 1, 2

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
