-- name: create
insert into study (name, model, spec) values (%(name)s, %(model)s, %(spec)s) on conflict do nothing

-- name: get
select * from study where name = %(name)s

-- name: list
select s.*, count(j.*) filter (where j.rung = 0) as trials, count(j.*) filter (where j.state = 'done') as rungs_done,
    count(j.*) filter (where j.state in ('waiting', 'running')) as rungs_open, min(j.value) as best_loss,
    exists (
        select from run r join lease l on l.name = 'run:' || r.model and l.token = r.token and l.expires_at > now()
        where r.study = s.name
    ) as at_work
from study s left join rung_job j on j.study = s.name
group by s.name order by s.created_at desc

-- name: end
update study set state = %(state)s, stopped_by = %(stopped_by)s, best = %(best)s, updated_at = now()
where name = %(name)s

-- name: set_state
update study set state = %(state)s, stopped_by = %(stopped_by)s, best = null, updated_at = now()
where name = %(name)s and state = any(%(from)s)
  and not exists (select from run where run.study = study.name and run.state = 'completed')
returning name

-- name: its_run
-- The run whose search this is: how far it came, and whether it is at work
select r.id, r.version, exists (select from stage s where s.run_id = r.id and s.name = 'search') as searched,
       exists (select from lease l where l.name = 'run:' || r.model and l.token = r.token and l.expires_at > now()) as at_work
from run r where r.study = %(name)s

-- name: at_work
select exists (
    select from run r join lease l on l.name = 'run:' || r.model and l.token = r.token and l.expires_at > now()
    where r.study = %(name)s
) as at_work

-- name: hold_lease
-- A run that is about to begin waits until this is over
select from lease l join study s on l.name = 'run:' || s.model where s.name = %(name)s for update of l

-- name: search_again
delete from stage where run_id = %(run)s and name in ('search', 'evaluate')

-- name: lock
select * from study where name = %(name)s for no key update

-- name: jobs
select study, trial, rung, trial_id, params, steps, pack, state, token, attempts, worker, value, checkpoint, tokens, seconds,
    adapter_parameters, latency_ms, error, updated_at, clone_of,
    case when %(curves)s then curve end as curve   -- the largest part of a study by far
from rung_job where study = %(study)s order by trial, rung

-- name: curves
select trial, rung, curve from rung_job
where study = %(study)s and (trial, rung) in (select * from unnest(%(trials)s::int[], %(rungs)s::int[]))

-- name: begun
select trial, clone_of from rung_job where study = %(study)s and rung = 0 order by trial

-- name: add_job
-- A trial that a person stopped meanwhile gets no further rung.
insert into rung_job (study, trial, rung, trial_id, params, steps, checkpoint, pack, clone_of)
select %(study)s, %(trial)s, %(rung)s, %(trial_id)s, %(params)s, %(steps)s, %(checkpoint)s, %(pack)s, %(clone_of)s
where not exists (select from rung_job where study = %(study)s and trial = %(trial)s and state = 'pruned')
on conflict do nothing

-- name: claim
-- Only a pack's first waiting member is looked for and locked, so that two workers never hold parts of one.
with first as (
    select j.study, j.rung, j.pack from rung_job j join study s on s.name = j.study
    where j.study = %(study)s and s.state = 'running' and j.state = 'waiting' and j.pack <> all(%(without)s::int[])
      and j.rung > %(above)s
      and not exists (select from rung_job o where o.study = j.study and o.rung = j.rung and o.pack = j.pack
                      and o.state = 'waiting' and o.trial < j.trial)
    order by j.clone_of is null, j.rung desc, j.pack limit 1 for update of j skip locked)
update rung_job j set state = 'running', token = token + 1, attempts = attempts + 1, worker = %(worker)s,
    lease_until = now() + make_interval(secs => %(seconds)s), updated_at = now()
from first where (j.study, j.rung, j.pack) = (first.study, first.rung, first.pack) and j.state = 'waiting'
returning j.*

-- name: rung_is_over
select not exists (select from rung_job where study = %(study)s and rung = %(rung)s and state in ('waiting', 'running'))
    as over

-- name: unpack
update rung_job set state = 'waiting', attempts = attempts - 1, pack = trial, lease_until = null, updated_at = now()
where study = %(study)s and trial = %(trial)s and rung = %(rung)s and token = %(token)s and state = 'running'
returning token

-- name: went_on
update study set seconds = seconds + %(seconds)s, seconds_left = %(left)s where name = %(name)s

-- name: measured
update study set adapters_per_pass = %(number)s where name = %(name)s and adapters_per_pass is null

-- name: renew
update rung_job set lease_until = now() + make_interval(secs => %(seconds)s)
where study = %(study)s and trial = %(trial)s and rung = %(rung)s and token = %(token)s and state = 'running'
returning token

-- name: finish
update rung_job set state = 'done', value = %(value)s, curve = %(curve)s, checkpoint = %(checkpoint)s,
    tokens = %(tokens)s, seconds = %(seconds)s, adapter_parameters = %(adapter_parameters)s,
    latency_ms = %(latency_ms)s,
    lease_until = null, error = null, updated_at = now()
where study = %(study)s and trial = %(trial)s and rung = %(rung)s and token = %(token)s and state = 'running'
returning token

-- What hindered a search in which nothing succeeded, such as a full disk, may be gone.
-- name: reopen
update rung_job set state = 'waiting', attempts = 0, deaths = 0, error = null, lease_until = null, updated_at = now()
where study = %(name)s and state = 'failed'

-- Of this study's alone: the same training twice has the same digest
-- name: checkpoints
select distinct checkpoint from rung_job mine
where study = %(study)s and checkpoint is not null
    and not exists (select from rung_job other where other.checkpoint = mine.checkpoint and other.study <> mine.study)

-- name: fail
update rung_job set state = 'failed', error = %(error)s, tokens = %(tokens)s, seconds = %(seconds)s,
    lease_until = null, updated_at = now()
where study = %(study)s and trial = %(trial)s and rung = %(rung)s and token = %(token)s and state = 'running'
returning token

-- name: spoil
update rung_job set state = 'failed', error = %(error)s, value = null, checkpoint = null, updated_at = now()
where study = %(study)s and trial = %(trial)s and rung = %(rung)s and state in ('done', 'pruned')

-- name: check
select token from rung_job
where study = %(study)s and trial = %(trial)s and rung = %(rung)s and token = %(token)s and state = 'running'

-- name: prune
update rung_job set state = 'pruned', token = token + 1, lease_until = null, updated_at = now()
where study = %(study)s and trial = %(trial)s and rung = %(rung)s

-- name: variants
select number, clone_of, params, trial from variant where study = %(study)s order by number

-- name: ask_variant
insert into variant (study, number, clone_of, params)
select %(study)s, coalesce(max(number), 0) + 1, %(clone_of)s, %(params)s from variant where study = %(study)s

-- name: variant_begun
update variant set trial = %(trial)s where study = %(study)s and number = %(number)s

-- name: bury
-- Whoever kills workers shows when the members of a pack are tried alone, which they are after the second time; what
-- they died of in company counts once then.
update rung_job j set lease_until = null, updated_at = now(),
    deaths = case when deaths + 1 = 2 and exists (
                      select from rung_job o
                      where o.study = j.study and o.rung = j.rung and o.pack = j.pack and o.trial <> j.trial)
                  then 1 else deaths + 1 end,
    pack = case when deaths + 1 < 2 then pack else trial end,
    state = case when deaths + 1 < %(deaths)s then 'waiting' else 'failed' end,
    error = case when deaths + 1 < %(deaths)s then error
                 else 'its worker died ' || deaths + 1 || ' times, as it does where memory runs out; last ' || worker end
where study = %(study)s and worker = %(worker)s and state = 'running'

-- name: give_back
update rung_job set state = 'waiting', attempts = attempts - 1, lease_until = null, updated_at = now()
where study = %(study)s and worker = %(worker)s and state = 'running'

-- name: reap
-- Nobody saw why these workers went: mostly all of a machine's did at once, whatever trained there. Who trains in a pack
-- rounds otherwise than alone, so only the second half of the attempts is made alone.
update rung_job set lease_until = null, updated_at = now(),
    pack = case when attempts < %(attempts)s / 2 then pack else trial end,
    state = case when attempts < %(attempts)s then 'waiting' else 'failed' end,
    error = case when attempts < %(attempts)s then error
                 else 'its workers were gone ' || attempts || ' times, perhaps with their machines; last ' || worker end
where study = %(study)s and state = 'running' and lease_until < now()
