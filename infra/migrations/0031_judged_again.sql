-- Who judged, where a golden set is scored by a judge, and what it said of the same answers when the version was judged.
alter table rescoring add column judge jsonb;
