-- Versions that a person deleted: that they were there, what they were, and who took them away stays for ever.
create table deletion (
    model text not null references model,
    number int not null,
    at timestamptz not null default clock_timestamp(),
    actor text not null,
    reason text not null,
    bundle_digest text not null,
    mlflow_model_id text,
    evaluation text references evidence,
    gate text references evidence,
    primary key (model, number)
);
create function deletion_is_append_only() returns trigger language plpgsql as $$
begin raise exception 'deletions are append-only'; end $$;
create trigger deletion_append_only before update or delete or truncate on deletion
    for each statement execute function deletion_is_append_only();
