-- name: raise
insert into alert (id, model, version, rule, severity, message, details, cause, began_at)
values (%(id)s, %(model)s, %(version)s, %(rule)s, %(severity)s, %(message)s, %(details)s, %(cause)s, %(began_at)s)
on conflict (model, coalesce(version, 0), rule) where closed_at is null do update
    set seen_at = now(), message = excluded.message, details = excluded.details,
        cause = coalesce(excluded.cause, alert.cause),
        -- A beginning is that of its cause, and the earliest that was found for it
        began_at = case when excluded.cause is distinct from alert.cause and excluded.cause is not null
                        then excluded.began_at else least(excluded.began_at, alert.began_at) end,
        -- An open alert gets worse, never better, so that a figure at the upper of two limits does not flicker
        (severity, told_at) = (
            select case when worse then excluded.severity else alert.severity end,
                   case when not worse or %(silenced)s then alert.told_at end
            from (select array_position(%(severities)s::text[], excluded.severity)
                         > array_position(%(severities)s::text[], alert.severity) as worse) compared)
returning id, opened_at, told_at, severity, cause, began_at, (xmax = 0) as opened,
    -- Once a minute, while more of it comes, and for an hour where it was not found
    coalesce(explained_at < now() - interval '1 minute'
             and opened_at > now() - case when cause is null then interval '1 hour' else interval '15 minutes' end,
             explained_at is null) as to_explain

-- name: explain
update alert set explained_at = now(), cause = coalesce(%(cause)s, cause),
    began_at = case when %(cause)s::text is null then began_at else %(began_at)s end
where id = %(id)s
returning cause, began_at

-- name: gateways
-- Of each model: how many gateways follow it, and how many of them do not serve all that it says. One that has been
-- silent since before the last change may still answer, by what it knew; one that ended well has taken its rows away.
select d.model, d.champion as version, d.generation, count(r.id) as gateways,
       count(r.id) filter (where not r.ready or r.silent) as behind,
       min(case when r.silent then 'nothing is heard of it' else r.message end)
           filter (where not r.ready or r.silent) as why
from deployment d
left join (select *, seen_at < now() - interval '15 seconds' as silent from replica) r
    on r.model = d.model and (not r.silent
        or (r.generation < d.generation and r.seen_at > now() - interval '1 hour'))
where d.champion is not null
group by d.model

-- name: budgets
select a.kind, a.amount, s.used, s.used / a.amount as share
from allowance a
join spending s on s.scope = a.scope and s.name = a.name and s.kind = a.kind
    and s.start = date_trunc(case a.kind when 'usd' then 'day' else 'month' end, now(), 'UTC')
where a.scope = 'model' and a.name = %(model)s and a.kind in ('usd', 'usd_month') and a.amount > 0

-- name: refused
-- What was refused before a version was found for it (status >= 400 is what the index of failures has), beside what the
-- windows have of all versions
select r.refused, r.why, w.answered
from (
    select count(*) as refused, mode() within group (order by error) as why from request_event
    where model = %(model)s and version is null and status in (429, 503) and status >= 400
        and at >= %(since)s and at < %(until)s) r
cross join (
    select coalesce(sum(requests), 0) as answered from traffic_window
    where model = %(model)s and grain = 'minute' and start >= %(since)s and start < %(until)s) w

-- name: told
update alert set told_at = now() where id = %(id)s

-- name: settings
select settings from model where name = %(model)s

-- name: seen
update alert set seen_at = now()
where model = %(model)s and version = %(version)s and rule = %(rule)s and closed_at is null

-- name: close
update alert set closed_at = now()
where model = %(model)s and version = %(version)s and rule = %(rule)s and closed_at is null
returning id, severity, message, cause, began_at, opened_at, closed_at, told_at

-- name: close_silent
-- Neither confirmed nor over for long: there is no traffic that could tell.
update alert set closed_at = now()
where model = %(model)s and version = %(version)s and rule = %(rule)s and closed_at is null
    and seen_at < now() - make_interval(secs => %(seconds)s)
returning id, severity, message, cause, began_at, opened_at, closed_at, told_at

-- name: close_retired
-- Alerts of versions that hold no slot any more, and of rules that were taken out of the settings.
update alert a set closed_at = now()
where a.model = %(model)s and a.closed_at is null and a.version is not null
    and not (a.version = any(%(versions)s) and a.rule = any(%(rules)s))
returning a.id, a.version, a.rule, a.severity, a.message, a.cause, a.began_at, a.opened_at, a.closed_at, a.told_at

-- name: silence
insert into silence (model, rule, until, actor, reason)
values (%(model)s, %(rule)s, now() + make_interval(secs => %(seconds)s), %(actor)s, %(reason)s)
returning until

-- name: unsilence
update silence set until = now()
where model = %(model)s and until > now() and (%(rule)s::text is null or rule = %(rule)s)

-- name: silenced
select exists (
    select from silence where model = %(model)s and (rule is null or rule = %(rule)s) and until > now()) as yes

-- name: silences
select model, rule, until, actor, reason from silence where until > now() order by until

-- name: list
select id, model, version, rule, severity, message, details, cause, began_at, opened_at, seen_at, closed_at
from alert
where (%(model)s::text is null or model = %(model)s)
    and (closed_at is null or (%(all)s and opened_at > now() - interval '30 days'))
order by closed_at is not null, opened_at desc
limit 500

-- name: opened_at
select opened_at from alert
where model = %(model)s and version = %(version)s and rule = %(rule)s and closed_at is null

-- name: drop_old
delete from alert where closed_at < now() - make_interval(days => %(days)s)
