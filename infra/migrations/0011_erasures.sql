-- Whose text was erased, and when: what of theirs was on its way then is stored without it.
create table erasure (
    id bigint generated always as identity primary key,
    subject text not null,                  -- the requests' `user`, hashed as in request_event
    at timestamptz not null default clock_timestamp(),
    actor text not null,
    reason text not null
);
create index erasure_by_subject on erasure (subject, at);
