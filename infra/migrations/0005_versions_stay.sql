-- What lists of versions show, in the row itself: ten thousand of them are read without their manifests and evidence.
alter table version
    add column base_id text generated always as (manifest -> 'base' ->> 'id') stored,
    add column decision text;               -- the gate's; null: never judged
update version v set decision = g.body ->> 'decision' from evidence g where g.digest = v.gate;

-- A version is what was judged, and the ledger must be able to bring back whatever stood in a slot: no hand in the
-- database changes a version, or takes away one that serves, served or took part.
create function version_stays() returns trigger language plpgsql as $$
begin
    if tg_op = 'UPDATE' then
        raise exception 'versions are immutable: %:% was not changed', old.model, old.number;
    end if;
    if exists (select from ledger where model = old.model and old.number in (from_version, to_version)) then
        raise exception 'the ledger needs %:%, which serves or could be rolled back to', old.model, old.number;
    end if;
    return old;
end $$;
create trigger version_stays_as_it_is
    before update of model, number, bundle_digest, base_digest, dataset_digest, method, study, run_id, manifest,
                     metrics, evaluation, gate, profile, decision
    on version for each row execute function version_stays();
create trigger version_stays_here before delete on version for each row execute function version_stays();
-- What a version stands on, and the ledger's evidence, by digest: neither is ever rewritten
create function evidence_stays() returns trigger language plpgsql as $$
begin raise exception 'evidence is kept for ever, by its digest'; end $$;
create trigger evidence_stays before update or delete or truncate on evidence
    for each statement execute function evidence_stays();
