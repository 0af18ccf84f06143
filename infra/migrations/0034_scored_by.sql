-- A person who reviews an answer says nothing of when, and by whom, it was scored: that stays, and the reviewer has a
-- column of their own
alter table feedback add column scored_at timestamptz, add column reviewer text;
update feedback set scored_at = at where score is not null;
update feedback set reviewer = key_id where review is not null;
create index feedback_scored on feedback (model, scored_at) where score is not null;
