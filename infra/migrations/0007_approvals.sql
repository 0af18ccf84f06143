-- Who agreed that a version may serve. Without a reference to the version: what people said outlives it.
create table approval (
    model text not null references model,
    number int not null,
    person text not null,                   -- key:<id> or os:user@host: one approval a person
    actor text not null,                    -- the same with the key's name, as the ledger has it
    role text not null check (role in ('operator', 'admin')),
    reason text not null,
    bundle_digest text not null,            -- what was approved
    at timestamptz not null default clock_timestamp(),
    primary key (model, number, person)
);
create function approval_is_append_only() returns trigger language plpgsql as $$
begin raise exception 'approvals are append-only'; end $$;
create trigger approval_append_only before update or delete or truncate on approval
    for each statement execute function approval_is_append_only();
