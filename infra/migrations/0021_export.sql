-- Batches whose requests an OpenTelemetry collector is still to be told of: set when a batch is merged into windows by
-- a watcher that was given a collector, cleared when the collector has taken them.
alter table event_batch add column to_export boolean not null default false;
create index event_batch_to_export on event_batch (created_at) where to_export;
