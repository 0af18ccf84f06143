-- What each key used of each version on each day (UTC), counted in the same transaction as the windows; and who learned
-- from a data set.
create table key_usage (
    model text not null,
    version int not null,
    key_id text not null,
    day date not null,
    requests bigint not null,
    prompt_tokens bigint not null,
    completion_tokens bigint not null,
    cost_nano_usd bigint not null,
    primary key (model, day, version, key_id)
);

create index version_by_dataset on version (dataset_digest);
