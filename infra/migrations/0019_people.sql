-- Whose key it is: two keys of one person approve once, and an author's key approves nothing of theirs.
alter table api_key add column person text;
