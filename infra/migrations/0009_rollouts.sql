-- Canaries in steps: what is being tried, how far it is, and what was decided at each step.
create table rollout (
    id bigint generated always as identity primary key,
    model text not null references model,
    version int not null,
    champion int not null,                  -- that it is compared with
    plan jsonb not null,                    -- registry/rollouts.py
    actor text not null,
    reason text not null,
    state text not null default 'running' check (state in ('running', 'promoted', 'taken_back', 'stopped')),
    step int not null default 0,
    begun_at timestamptz not null default clock_timestamp(),
    step_at timestamptz not null default clock_timestamp(),
    seen_at timestamptz,
    said text not null default '',          -- the last decision, as a sentence
    findings jsonb not null default '[]',   -- and what it rests on
    ended_at timestamptz,
    foreign key (model, version) references version (model, number)
);
create unique index rollout_running on rollout (model) where state = 'running';
create index rollout_by_model on rollout (model, id);
