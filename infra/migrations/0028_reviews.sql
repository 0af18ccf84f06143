-- What a reviewer says of an answer is of answers that were looked for, so it is no sample of what people say, as scores
-- are: it stands apart from them, and takes an answer out of the queue.
alter table feedback add column review double precision check (review between -1 and 1);
