-- A version that was judged again is approved again, by the same people too; what they said before stays.
alter table approval drop constraint approval_pkey;
alter table approval add primary key (model, number, person, at);

-- The page of a later judgement, as HTML; the first one's is in the bundle
alter table judgement add column report text;
