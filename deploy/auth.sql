-- name: insert_key
insert into api_key (id, name, role, hash, person, watched)
values (%(id)s, %(name)s, %(role)s, %(hash)s, %(person)s, %(watched)s)
on conflict (name) where not watched do update set hash = excluded.hash, role = excluded.role, revoked_at = null
returning id

-- name: list_keys
select id, name, role, person, created_at, revoked_at from api_key order by created_at, id

-- name: revoke_key
update api_key set revoked_at = coalesce(revoked_at, now()) where id = %(id)s
returning id, name, role, person, created_at, revoked_at

-- name: end_sessions_of_key
delete from session where key_id = %(id)s

-- name: valid_keys
select id, name, role, hash, watched from api_key where revoked_at is null

-- name: valid_sessions
select s.hash, s.key_id from session s join api_key k on k.id = s.key_id
where s.expires_at > now() and k.revoked_at is null

-- name: insert_session
insert into session (hash, key_id, expires_at) values (%(hash)s, %(key_id)s, now() + %(seconds)s * interval '1 second')

-- name: delete_expired_sessions
delete from session where expires_at < now()

-- name: delete_session
delete from session where hash = %(hash)s
