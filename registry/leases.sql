-- name: acquire
insert into lease as held (name, holder, token, acquired_at, expires_at)
values (%(name)s, %(holder)s, 1, clock_timestamp(), clock_timestamp() + make_interval(secs => %(seconds)s))
on conflict (name) do update
    set holder = excluded.holder, token = held.token + 1,
        acquired_at = excluded.acquired_at, expires_at = excluded.expires_at
    where held.expires_at <= clock_timestamp()
returning name, holder, token, expires_at

-- name: held
select holder, acquired_at, expires_at from lease where name = %(name)s

-- name: renew
-- Also after it ran out: until another takes it, which changes the token, it is still the holder's.
update lease set expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where name = %(name)s and token = %(token)s
returning name, holder, token, expires_at

-- name: check
select token from lease where name = %(name)s for share

-- name: release
update lease set expires_at = clock_timestamp() where name = %(name)s and token = %(token)s
