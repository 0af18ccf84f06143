-- The whole of the first schema. Times are timestamptz on the database's clock; digests are 'sha256:<hex>'.

-- ---------------------------------------------------------------- what there is
create table model (
    name text primary key check (name ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    created_at timestamptz not null default now(),
    -- the pipeline file's `monitoring` and `retrain` sections and its path, as of the last run
    settings jsonb not null default '{}'
);

create table base (
    digest text primary key,
    id text not null,                       -- as written: a hub id, a folder, builtin:...
    revision text not null,
    tokenizer_digest text not null,
    template_digest text not null,
    parameters bigint not null,
    dtype text not null,
    created_at timestamptz not null default now()
);

create table dataset (
    digest text primary key,
    model text not null references model,
    created_at timestamptz not null default now(),
    counts jsonb not null,                  -- {"train": 900, "validation": 100, "test": 120, "quarantined": 2, ...}
    sources jsonb not null,                 -- [{"path", "digest", "rows", "origin"}]
    parent text references dataset
);
create index dataset_by_model on dataset (model, created_at);

create table evidence (
    digest text primary key,
    kind text not null,                     -- evaluation, gate
    body jsonb not null,
    created_at timestamptz not null default now()
);

create table version (
    model text not null references model,
    number int not null check (number > 0), -- given by MLflow's registry
    created_at timestamptz not null default now(),
    bundle_digest text not null,
    base_digest text not null references base,
    dataset_digest text references dataset,
    method text not null,                   -- lora, prompt, imported
    study text,
    run_id uuid,
    mlflow_run_id text,
    mlflow_model_id text,
    manifest jsonb not null,                -- version.json of the bundle
    metrics jsonb not null default '{}',    -- headline numbers {"exact_match": 0.71}
    evaluation text references evidence,
    gate text references evidence,
    profile jsonb not null,                 -- the frozen reference (registry/profile.py)
    primary key (model, number)
);

-- ---------------------------------------------------------------- what serves
create table deployment (
    model text primary key references model,
    generation bigint not null default 0,
    champion int,
    challenger int,
    challenger_share double precision not null default 0 check (challenger_share between 0 and 1),
    shadow int,
    updated_at timestamptz not null default now(),
    foreign key (model, champion) references version (model, number),
    foreign key (model, challenger) references version (model, number),
    foreign key (model, shadow) references version (model, number)
);

create table ledger (
    model text not null references model,
    generation bigint not null,
    at timestamptz not null default clock_timestamp(),
    actor text not null,
    action text not null check (action in ('promote', 'rollback', 'canary', 'shadow', 'stop')),
    slot text not null check (slot in ('champion', 'challenger', 'shadow')),
    from_version int,
    to_version int,
    share double precision,
    reason text not null,
    forced boolean not null default false,
    evidence text references evidence,
    previous_hash text not null,
    hash text not null,
    primary key (model, generation)
);
create function ledger_is_append_only() returns trigger language plpgsql as $$
begin raise exception 'the ledger is append-only'; end $$;
create trigger ledger_append_only before update or delete or truncate on ledger
    for each statement execute function ledger_is_append_only();

create function tell_deployment() returns trigger language plpgsql as $$
begin perform pg_notify('tunesmith_deployment', new.model); return new; end $$;
create trigger deployment_changed after insert or update on deployment
    for each row execute function tell_deployment();

create table outbox (                       -- projections written after the commit: MLflow aliases
    id bigint generated always as identity primary key,
    kind text not null,                     -- mlflow_aliases
    model text not null,
    created_at timestamptz not null default now(),
    attempts int not null default 0,
    next_attempt_at timestamptz not null default now(),
    done_at timestamptz,
    error text
);
create index outbox_open on outbox (next_attempt_at) where done_at is null;

-- ---------------------------------------------------------------- who holds what
create table lease (
    name text primary key,                  -- run:<model>, watch
    holder text not null,                   -- host:pid and what for
    token bigint not null,                  -- raised by every acquisition; every write checks it
    acquired_at timestamptz not null default now(),
    expires_at timestamptz not null
);

-- ---------------------------------------------------------------- what runs
create table run (
    id uuid primary key,
    model text not null references model,
    kind text not null check (kind in ('train', 'retrain', 'rescore')),
    state text not null check (state in ('running', 'completed', 'failed', 'cancelled')),
    fingerprint text not null,              -- config and data: an unfinished run with the same one is resumed
    config jsonb not null,
    config_path text not null,
    token bigint not null,                  -- the lease's, at start or at the last resumption
    study text,
    version int,
    flow_run_id uuid,
    mlflow_run_id text,
    result jsonb,                           -- what `run --json` prints
    error text,
    started_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    finished_at timestamptz
);
create index run_by_model on run (model, started_at);

create table stage (                        -- a finished stage is not run again
    run_id uuid not null references run,
    name text not null,                     -- prepare, search, evaluate, register
    output jsonb not null,
    seconds double precision not null,
    created_at timestamptz not null default now(),
    primary key (run_id, name)
);

create table study (
    name text primary key,                  -- also the Optuna study's name
    model text not null references model,
    created_at timestamptz not null default now(),
    spec jsonb not null,                    -- all a worker needs: base, data set, space, rungs, training defaults
    state text not null default 'running' check (state in ('running', 'completed', 'stopped', 'failed')),
    stopped_by text,                        -- trials, max_minutes, max_tokens, max_usd, user
    best jsonb,
    updated_at timestamptz not null default now()
);

create table rung_job (
    study text not null references study,
    trial int not null,                     -- Optuna's trial number
    rung int not null,
    trial_id int not null,                  -- Optuna's row id
    params jsonb not null,
    steps int not null,                     -- optimizer steps this rung ends at
    state text not null default 'waiting' check (state in ('waiting', 'running', 'done', 'failed')),
    token bigint not null default 0,        -- raised by every claim; every write checks it
    attempts int not null default 0,
    worker text,
    lease_until timestamptz,
    value double precision,                 -- validation loss at the end of the rung
    curve jsonb,                            -- [[step, training loss], ...]
    checkpoint text,                        -- artifact digest or path to resume from
    tokens bigint,
    seconds double precision,
    error text,
    updated_at timestamptz not null default now(),
    primary key (study, trial, rung)
);
create index rung_job_open on rung_job (study, rung desc, trial) where state in ('waiting', 'running');

-- ---------------------------------------------------------------- who may
create table api_key (
    id text primary key,                    -- the public part
    name text not null,
    role text not null check (role in ('viewer', 'service', 'operator', 'admin')),
    hash bytea not null,                    -- SHA-256 of a 256-bit random secret: no salt or stretching needed
    created_at timestamptz not null default now(),
    revoked_at timestamptz
);

create table session (                      -- console log-ins
    hash bytea primary key,
    key_id text not null references api_key,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null
);

-- ---------------------------------------------------------------- processes that serve
create table engine (
    id uuid primary key,
    base_digest text not null references base,
    url text not null,
    started_at timestamptz not null default now(),
    seen_at timestamptz not null default now()
);

create table replica (                      -- what each gateway has applied
    id uuid not null,
    model text not null references model,
    generation bigint not null,
    ready boolean not null,
    message text not null default '',
    seen_at timestamptz not null default now(),
    primary key (id, model)
);

-- ---------------------------------------------------------------- what happened
create table event_batch (                  -- one COPY of a recorder; replaying it is harmless
    id uuid primary key,
    replica uuid not null,
    rows int not null,
    created_at timestamptz not null default now(),
    windowed_at timestamptz                 -- set with the windows it was merged into, in one transaction
);
create index event_batch_open on event_batch (created_at) where windowed_at is null;

create table request_event (
    id uuid not null,                       -- UUIDv7, ours
    at timestamptz not null,                -- the id's own time, so that (at, id) is one event for ever
    batch uuid not null,
    model text not null,
    version int,                            -- null: refused before routing
    slot text not null,                     -- champion, challenger, shadow, pinned, none
    key_id text,
    client_request_id text,
    status smallint not null,
    error text,
    stream boolean not null,
    prompt_tokens int not null,
    completion_tokens int not null,
    ttft_ms real,
    latency_ms real not null,
    engine_seconds real not null,           -- this request's share of the engine's busy time
    cost_usd double precision not null,
    finish_reason text,
    features real[] not null,               -- in the order of registry.profile.FEATURES; NaN: not known
    subject text,                           -- the request's `user`, hashed
    messages jsonb,                         -- only when the model keeps text, redacted
    answer text,
    primary key (at, id)
) partition by range (at);
create index request_event_recent on request_event (model, at);
create index request_event_batch on request_event using brin (batch);
create table request_event_default partition of request_event default;

create table feedback (                     -- last write wins
    request_id uuid primary key,
    request_at timestamptz not null,
    model text not null,
    version int,
    at timestamptz not null default now(),
    key_id text,
    score double precision check (score between -1 and 1),
    label text,
    correction text,
    similarity double precision             -- answer against correction, 0 to 1 (chrF / 100)
);
create index feedback_by_model on feedback (model, at);

create table traffic_window (
    model text not null,
    version int not null,
    start timestamptz not null,
    grain text not null check (grain in ('minute', 'hour', 'day')),
    requests bigint not null,
    errors bigint not null,
    sketches jsonb not null,                -- monitoring/windows.py
    primary key (model, version, grain, start)
);

create table verdict (
    id uuid primary key,
    model text not null,
    version int not null,
    at timestamptz not null default now(),
    since timestamptz not null,
    until timestamptz not null,
    verdict text not null check (verdict in ('drift', 'stable', 'too_few')),
    body jsonb not null                     -- what `drift --json` prints
);
create index verdict_by_version on verdict (model, version, at);

create table alert (
    id uuid primary key,
    model text not null,
    version int,
    rule text not null,
    severity text not null check (severity in ('info', 'warning', 'critical')),
    message text not null,
    details jsonb not null default '{}',
    opened_at timestamptz not null default now(),
    seen_at timestamptz not null default now(),
    closed_at timestamptz
);
create unique index alert_open on alert (model, coalesce(version, 0), rule) where closed_at is null;

create table retrain_request (              -- a verdict asks once; guards decide
    id uuid primary key,
    model text not null references model,
    verdict uuid references verdict,
    at timestamptz not null default now(),
    state text not null check (state in ('asked', 'started', 'refused')),
    reason text not null,
    flow_run_id uuid
);
create index retrain_request_by_model on retrain_request (model, at);
