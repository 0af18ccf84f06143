-- How long a token of an answer takes when a trial's adapter serves it; measured where a study weighs it.
alter table rung_job add column latency_ms double precision;
