-- name: base
insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)
values (%(digest)s, 'b', 'r', %(digest)s, %(digest)s, 1, 'float32') on conflict do nothing

-- name: mlflow_versions
insert into model_versions (name, version, creation_time, last_updated_time, current_stage, source, status, workspace)
select 'big', n, 1700000000000 + n, 1700000000000 + n, 'None', 's3://none/none', 'READY', 'default'
from generate_series(1, %(count)s) n

-- name: mlflow_tags
insert into model_version_tags (name, version, key, value, workspace)
select 'big', n, 'metric.' || k, (n / 1e5)::text, 'default'
from generate_series(1, %(count)s) n, unnest(array['exact_match', 'loss', 'token_f1', 'rouge_l', 'chrf']) k
