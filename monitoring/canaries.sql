-- name: rated
-- By the minute it came, so that what was counted once does not change
select version, date_trunc('minute', at) as start, count(*)::int as n, count(*) filter (where score < 0)::int as bad
from feedback
where model = %(model)s and version = any(%(versions)s) and score is not null
    and at >= %(since)s and at < %(until)s and request_at >= %(since)s
group by version, start

-- name: rated_before
select count(*)::int as n, count(*) filter (where score < 0)::int as bad
from feedback
where model = %(model)s and version = %(version)s and score is not null and at >= %(since)s and at < %(until)s

-- name: alerts
-- Open for the one and not for the other
select a.rule, a.message from alert a
where a.model = %(model)s and a.version = %(version)s and a.closed_at is null and a.severity in ('warning', 'critical')
    and not exists (select from alert c where c.model = a.model and c.version = %(champion)s and c.rule = a.rule
                    and c.closed_at is null)
order by a.severity = 'critical' desc, a.opened_at
