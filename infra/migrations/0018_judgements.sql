-- Later judgements of a version, such as beside another champion: the newest is what its gates say. What it was first
-- judged by stays in its bundle and in its row.
create table judgement (
    id bigint generated always as identity primary key,
    model text not null,
    number int not null,
    at timestamptz not null default clock_timestamp(),
    actor text not null,
    reason text not null,
    metrics jsonb not null,
    evaluation text not null references evidence,
    gate text not null references evidence,
    decision text not null,
    foreign key (model, number) references version (model, number) on delete cascade
);
create index judgement_newest on judgement (model, number, id desc);

create function judgement_stays() returns trigger language plpgsql as $$
begin raise exception 'judgements are kept as they were made'; end $$;
create trigger judgement_stays before update on judgement for each row execute function judgement_stays();

create view judged as
select v.model, v.number, coalesce(j.metrics, v.metrics) as metrics, coalesce(j.evaluation, v.evaluation) as evaluation,
       coalesce(j.gate, v.gate) as gate, coalesce(j.decision, v.decision) as decision
from version v
left join (
    select distinct on (model, number) * from judgement order by model, number, id desc) j using (model, number);
