-- Ledger entries that a webhook is to be told of; written with the entry, delivered after the commit.
create table notification (
    id bigint generated always as identity primary key,
    model text not null,
    generation bigint not null,
    created_at timestamptz not null default now(),
    attempts int not null default 0,
    next_attempt_at timestamptz not null default now(),
    done_at timestamptz,
    error text
);
create index notification_open on notification (id) where done_at is null;
