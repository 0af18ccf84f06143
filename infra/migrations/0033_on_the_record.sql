-- Who brought a version from elsewhere, and so has no say among those who approve of it
alter table version add column imported_by text;

-- A judgement goes with its version, and not by any hand before
create function judgement_goes_with_its_version() returns trigger language plpgsql as $$
begin
    if tg_op = 'TRUNCATE' or exists (select from version where model = old.model and number = old.number) then
        raise exception 'judgements are kept as long as their versions';
    end if;
    return old;
end $$;
create trigger judgement_goes_with_its_version before delete on judgement
    for each row execute function judgement_goes_with_its_version();
create trigger judgement_is_not_truncated before truncate on judgement
    for each statement execute function judgement_goes_with_its_version();
