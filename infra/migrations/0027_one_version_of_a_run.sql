-- What a run, or an import, registered is one version, also where two registered it at once.
create unique index version_run on version (model, run_id);
