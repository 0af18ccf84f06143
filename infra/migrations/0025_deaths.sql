-- Of a job's attempts, those that ended with its worker's death while the worker's coordinator lived and saw it. A lease
-- that ran out says less: the whole machine may have gone.
alter table rung_job add column deaths int not null default 0;
