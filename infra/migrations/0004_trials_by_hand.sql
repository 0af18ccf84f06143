-- A person may stop one trial of a running search, and have a variant of another tried.
alter table rung_job drop constraint rung_job_state_check;
alter table rung_job add constraint rung_job_state_check
    check (state in ('waiting', 'running', 'done', 'failed', 'pruned'));
alter table rung_job add column clone_of int;   -- the trial that this one is a variant of; null for what was drawn

create table variant (                          -- asked for, and put up by the search's coordinator
    study text not null references study,
    number int not null,
    clone_of int not null,
    params jsonb not null,                      -- the whole configuration
    trial int,                                  -- begun as; null until then
    created_at timestamptz not null default now(),
    primary key (study, number)
);
