-- Alerts are told too, and to Slack-shaped addresses beside the webhook: a row for each who is to be told.
alter table notification
    alter column generation drop not null,
    add column target text not null default 'webhook' check (target in ('webhook', 'slack')),
    add column name text,                   -- the message's id; null: that of the ledger's entry
    add column message jsonb;               -- null: the ledger's entry
drop index notification_open;
create index notification_open on notification (target, id) where done_at is null;

-- When an alert was told; only what was told when it opened is told to be over
alter table alert add column told_at timestamptz;

-- Alerts that nobody wants to be told of for a while; they open and close all the same.
create table silence (
    id bigint generated always as identity primary key,
    model text not null references model,
    rule text,                              -- null: all of the model's
    until timestamptz not null,
    actor text not null,
    reason text not null,
    at timestamptz not null default clock_timestamp()
);
create index silence_by_model on silence (model, until);
