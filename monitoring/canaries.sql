-- name: rated
-- By the minute it came; not of requests that named a version or a slot
select version, date_trunc('minute', scored_at) as start, count(*)::int as n,
       count(*) filter (where score < 0)::int as bad
from feedback
where model = %(model)s and version = any(%(versions)s) and score is not null
    and scored_at >= %(since)s and scored_at < %(until)s and request_at >= %(since)s
    and not exists (select from request_event e
                    where e.at = feedback.request_at and e.id = feedback.request_id and e.slot in ('pinned', 'shadow'))
group by version, start

-- name: rated_before
select count(*)::int as n, count(*) filter (where score < 0)::int as bad
from feedback
where model = %(model)s and version = %(version)s and score is not null
    and scored_at >= %(since)s and scored_at < %(until)s

-- name: alerts
-- Opened for the one since it began, and not open for the other. What the test looks at itself (errors, latency) is left
-- to it, time to the first token too; drift counts where it is the version that moved, since a share of the users is no
-- sample of all
select a.rule, a.message from alert a
where a.model = %(model)s and a.version = %(version)s and a.closed_at is null and a.severity in ('warning', 'critical')
    and a.opened_at >= %(since)s and (a.rule <> 'drift' or a.cause = 'model') and a.rule not like 'error_rate%%'
    and a.rule not like '%%latency%%' and a.rule not like '%%ttft%%'
    and not exists (select from alert c where c.model = a.model and c.version = %(champion)s and c.rule = a.rule
                    and c.closed_at is null)
order by a.severity = 'critical' desc, a.opened_at
