-- Several trials train in one pass: a pack is named by the trial that leads it, and is claimed as a whole.
alter table rung_job add column pack int;
update rung_job set pack = trial;
alter table rung_job alter column pack set not null;

-- How many adapters in one pass the study's first worker measured to be best; null until then.
alter table study add column adapters_per_pass int;
