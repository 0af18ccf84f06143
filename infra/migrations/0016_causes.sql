-- What an alert was found to come of, of four, and since when it was so; null where that could not be told.
alter table alert
    add column cause text check (cause in ('input', 'model', 'judge', 'system')),
    add column began_at timestamptz,
    add column explained_at timestamptz;
