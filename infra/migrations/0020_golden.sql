-- A version's golden set, asked again: how well what serves answers the test rows that the version was judged by.
create table rescoring (
    id bigint generated always as identity primary key,
    model text not null,
    version int not null,
    at timestamptz not null default clock_timestamp(),
    metric text not null,
    rows int not null,
    failed int not null,                    -- rows without an answer, which count as empty ones
    score jsonb not null,                   -- estimates, with their intervals
    reference jsonb,                        -- of the answers that these are held against; null: there were none
    difference jsonb,                       -- score less reference, paired
    changed jsonb not null,                 -- how many rows are worse and better, and such rows
    answers jsonb,                          -- by row, where there were none before: what later ones are held against
    foreign key (model, version) references version (model, number) on delete cascade
);
create index rescoring_newest on rescoring (model, version, id desc);

-- Whether what a key asks is traffic; what we ask ourselves is none. Of a name there is one such key.
alter table api_key add column watched boolean not null default true;
create unique index api_key_of_ours on api_key (name) where not watched;
