-- Where hosted models answer, by the names that versions have for it. The keys stand in each gateway's environment, and
-- never here.
create table upstream (
    name text primary key check (name ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    url text not null,
    key_env text,                           -- the variable that holds the key; null: none is sent
    timeout_seconds real not null default 60 check (timeout_seconds > 0),
    actor text not null,
    at timestamptz not null default now()
);
