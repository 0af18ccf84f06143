-- What a key, or a model, may use, over all gateways; and what was used, by span.
create table allowance (
    scope text not null check (scope in ('key', 'model')),
    name text not null,                     -- the key's id, or the model
    kind text not null check (kind in ('requests', 'tokens', 'usd')),
    amount double precision not null check (amount >= 0),
    actor text not null,
    at timestamptz not null default clock_timestamp(),
    primary key (scope, name, kind)
);
create table spending (
    scope text not null,
    name text not null,
    kind text not null,
    start timestamptz not null,             -- of a UTC minute (requests, tokens) or day (usd)
    used double precision not null default 0,
    primary key (scope, name, kind, start)
);
