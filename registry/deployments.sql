-- name: read
select m.name as model, coalesce(d.generation, 0) as generation, d.champion, d.challenger,
       coalesce(d.challenger_share, 0) as challenger_share, d.shadow
from model m left join deployment d on d.model = m.name
where m.name = %(model)s

-- name: create
insert into deployment (model) values (%(model)s) on conflict (model) do nothing

-- name: lock
select model, generation, champion, challenger, challenger_share, shadow
from deployment where model = %(model)s for update

-- name: share
select 1 from deployment where model = %(model)s for share

-- name: version
select v.bundle_digest, j.evaluation, j.gate, g.body as gate_body
from version v join judged j using (model, number) left join evidence g on g.digest = j.gate
where v.model = %(model)s and v.number = %(number)s

-- name: next_entry
-- The database's clock, and never before the last entry, so that `history --at` has one answer.
select greatest(clock_timestamp(), l.at) as at, l.hash, coalesce(l.generation, 0) as generation
from (values (1)) as one left join lateral (
    select at, hash, generation from ledger where model = %(model)s order by generation desc limit 1) l on true

-- name: update
update deployment
set generation = %(generation)s, champion = %(champion)s, challenger = %(challenger)s,
    challenger_share = %(challenger_share)s, shadow = %(shadow)s, updated_at = %(at)s
where model = %(model)s

-- name: append
insert into ledger (model, generation, at, actor, action, slot, from_version, to_version, share, reason, forced,
                    evidence, previous_hash, hash)
values (%(model)s, %(generation)s, %(at)s, %(actor)s, %(action)s, %(slot)s, %(from_version)s, %(to_version)s,
        %(share)s, %(reason)s, %(forced)s, %(evidence)s, %(previous_hash)s, %(hash)s)

-- name: enqueue
insert into outbox (kind, model) values ('mlflow_aliases', %(model)s)

-- name: notify
insert into notification (model, generation, target)
select %(model)s, %(generation)s, target from unnest(array['webhook', 'slack']) as target

-- name: champions
select action, from_version, to_version from ledger
where model = %(model)s and slot = 'champion' order by generation

-- name: history
select model, generation, at, actor, action, slot, from_version, to_version, share, reason, forced, evidence,
       previous_hash, hash
from ledger
where model = %(model)s and (%(at)s::timestamptz is null or at <= %(at)s) order by generation

-- name: evidence
-- Each once, with the first entry that rests on it
select l.evidence as digest, e.body, l.generation
from (select evidence, min(generation) as generation from ledger
      where model = %(model)s and evidence is not null group by evidence) l
left join evidence e on e.digest = l.evidence order by l.generation
