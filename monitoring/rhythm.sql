-- name: first_days
-- How many days before `end` a version's first days with enough requests ended, the earliest first. The last day before
-- `end` is what is judged
select back
from (
    select (extract(epoch from %(end)s::timestamptz - start)::bigint - 1) / 86400 as back, requests
    from traffic_window
    where model = %(model)s and version = %(version)s and grain = 'hour' and start < %(end)s - interval '24 hours'
) hours
group by back
having sum(requests) >= %(least)s
order by back desc
limit %(most)s
