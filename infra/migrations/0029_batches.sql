-- Between which times a batch's events lie, so that they are found without a look at all the others; of batches from before
-- nobody knows. Batches have time-ordered ids now, by which the index tells the few pages that one stands in.
alter table event_batch
    add column first_at timestamptz not null default '1970-01-01',
    add column last_at timestamptz not null default '9999-01-01';
drop index request_event_batch;
create index request_event_batch on request_event using brin (batch) with (autosummarize = on);
