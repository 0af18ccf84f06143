-- What feedback says, as windows count it (1 rated, 2 disliked, 4 corrected), and what they have of it already.
alter table feedback add column counts int generated always as (
    (score is not null)::int + 2 * coalesce(score < 0, false)::int + 4 * (correction is not null)::int
) stored;
alter table feedback add column counted int not null default 0;
create index feedback_uncounted on feedback (request_at) where counts <> counted and version is not null;
