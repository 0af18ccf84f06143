-- name: all
select scope, name, kind, amount from allowance

-- name: put
insert into allowance (scope, name, kind, amount, actor) values (%(scope)s, %(name)s, %(kind)s, %(amount)s, %(actor)s)
on conflict (scope, name, kind) do update set amount = excluded.amount, actor = excluded.actor, at = clock_timestamp()

-- name: remove
delete from allowance where scope = %(scope)s and name = %(name)s

-- name: known_key
select 1 as yes from api_key where id = %(name)s and revoked_at is null

-- name: begin_span
insert into spending (scope, name, kind, start)
values (%(scope)s, %(name)s, %(kind)s, date_trunc(%(unit)s, now(), 'UTC'))
on conflict do nothing

-- name: look
select used, extract(epoch from start + %(length)s::interval - clock_timestamp())::float8 as seconds
from spending
where scope = %(scope)s and name = %(name)s and kind = %(kind)s and start = date_trunc(%(unit)s, now(), 'UTC')
for update

-- name: take
update spending set used = used + %(taken)s
where scope = %(scope)s and name = %(name)s and kind = %(kind)s and start = date_trunc(%(unit)s, now(), 'UTC')

-- name: listing
select a.scope, a.name, a.kind, a.amount, u.unit, a.actor, a.at, k.name as key_name,
    case when u.unit is not null then coalesce(s.used, 0) end as used
from allowance a
cross join lateral (
    select case a.kind when 'usd' then 'day' when 'usd_month' then 'month' when 'concurrent' then null else 'minute' end
        as unit
) u
left join api_key k on a.scope = 'key' and k.id = a.name
left join spending s on s.scope = a.scope and s.name = a.name and s.kind = a.kind
    and s.start = date_trunc(u.unit, now(), 'UTC')
order by a.scope, a.name, a.kind

-- name: drop_old
delete from spending where start < now() - case kind when 'usd_month' then interval '2 months' else interval '2 days' end
