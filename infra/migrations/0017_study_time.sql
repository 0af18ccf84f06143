-- How long each search has gone on for: what its budget of minutes counts
alter table study add column seconds double precision not null default 0;
update study set seconds = coalesce((select sum(seconds) from rung_job where study = study.name), 0)
    / greatest(1, coalesce((spec ->> 'workers')::int, 1));
