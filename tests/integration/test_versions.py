"""Versions against a real MLflow server: lineage, idempotence, aliases, import and export (faults 7, 8, 11, 12)."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from drafts import make_draft, make_version
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from safetensors.numpy import load_file, save_file

from infra import storage
from infra.db import one, transaction
from infra.errors import Conflict, NotFound, Refused, StoreFull, TunesmithError, Unreachable, UsageError
from infra.settings import get_settings
from monitoring import watch
from registry import aliases, bases, bundle, deletion, deployments, judgements, mlflow, versions
from registry.exchange import export_version, fetched_from_mlflow, import_version
from registry.gates import Decision
from registry.verification import verify_version

WHO = {"actor": "os:test@here", "reason": "because"}


def _rest(path: str, **params: str) -> Any:
    url = get_settings().need("mlflow_url")
    return httpx.get(f"{url}/api/2.0/mlflow/{path}", params=params, trust_env=False, timeout=60).json()


def _aliases(model: str) -> dict[str, str]:
    found = _rest("registered-models/get", name=model)["registered_model"].get("aliases", [])
    return {entry["alias"]: entry["version"] for entry in found}


def _deliver() -> int:
    with transaction() as conn:
        return aliases.deliver(conn)


def test_a_version_carries_its_lineage_into_mlflow(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_PUBLIC_URL", "https://models.example.org/")
    get_settings.cache_clear()
    version = make_version(make_draft(model, base, adapter))
    assert (version.number, version.method, version.base_digest) == (1, "lora", base.digest)
    found = _rest("model-versions/get", name=model, version="1")["model_version"]
    tags = {tag["key"]: tag["value"] for tag in found["tags"]}
    assert tags["tunesmith.bundle"] == version.bundle_digest
    assert tags["tunesmith.base_digest"] == base.digest
    assert tags["tunesmith.study"] == f"{model}-study"
    assert tags["tunesmith.gate"] == "pass"
    assert float(tags["metric.loss"]) == pytest.approx(2.5, abs=0.2)
    assert found["run_id"] == version.mlflow_run_id
    assert "## Evaluation" in found["description"]
    address = f"https://models.example.org/models/{model}/versions/1"
    assert found["description"].startswith(f"[This version in Tunesmith's console]({address})\n\n")
    assert "<brief>" in found["description"]
    files = _rest("artifacts/list", run_id=version.mlflow_run_id)["files"]
    assert [file["path"] for file in files] == ["report.html"]
    assert mlflow.run_url(str(version.mlflow_run_id)).endswith(f"/runs/{version.mlflow_run_id}")
    assert httpx.get(mlflow.version_url(model, 1), trust_env=False, timeout=60).status_code == 200
    adapter_folder = version.adapter()
    assert adapter_folder is not None
    assert sorted(path.name for path in adapter_folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    states = {check.name: check.state for check in verify_version(model, 1)}
    assert states == {
        "bundle": "ok", "signature": "none", "evidence": "ok", "mlflow": "ok", "base": "ok", "dataset": "none",
        "ledger": "ok",
    }  # fmt: skip


def test_a_registration_that_was_interrupted_anywhere_ends_as_one_version(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str
) -> None:
    """Killed between MLflow and our row: the same run takes up what MLflow has; a changed bundle replaces it."""
    digest, run_id = versions.seal(make_draft(model, base, adapter)), uuid.uuid4()
    assert versions.seal(make_draft(model, base, adapter)) == digest
    run = mlflow.start_run(mlflow.experiment_of(model), "train", key="k")
    assert mlflow.start_run(mlflow.experiment_of(model), "train", key="k") == run

    def fenced_off(conn: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # after MLflow, before our row
            raise Conflict("another process took over")

    calls: list[int] = []
    with pytest.raises(Conflict):
        versions.register(digest, run_id=run_id, mlflow_run_id=run, guard=fenced_off)
    with transaction() as conn, pytest.raises(NotFound):
        versions.get(conn, model, 1)
    assert versions.register(digest, run_id=run_id, mlflow_run_id=run).number == 1
    assert versions.register(digest, run_id=run_id, mlflow_run_id=run).number == 1

    calls, run_id = [], uuid.uuid4()
    with pytest.raises(Conflict):
        versions.register(digest, run_id=run_id, mlflow_run_id=run, guard=fenced_off)
    other = versions.seal(make_draft(model, base, adapter, seed=2))
    assert versions.register(other, run_id=run_id, mlflow_run_id=run).number == 3
    found = httpx.get(
        f"{mlflow_server}/api/2.0/mlflow/model-versions/search", params={"filter": f"name='{model}'"}, trust_env=False
    ).json()["model_versions"]
    assert sorted(v["version"] for v in found) == ["1", "3"]


def test_aliases_follow_whatever_happened_to_mlflow_meanwhile(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        make_version(make_draft(model, base, adapter, seed=seed))
    with transaction() as conn:
        deployments.promote(conn, model, 1, **WHO)
        deployments.canary(conn, model, 2, share=0.1, **WHO)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # MLflow is away: serving is right at once
    get_settings.cache_clear()
    assert _deliver() == 0
    with transaction() as conn:
        row = one(conn, "select min(attempts) as n, bool_or(done_at is not null) as done from outbox")
        assert row == {"n": 1, "done": False}
        assert deployments.read(conn, model).champion == 1
        conn.execute("update outbox set next_attempt_at = now()")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    get_settings.cache_clear()
    assert (_deliver(), _aliases(model)) == (1, {"champion": "1", "challenger": "2"})
    with transaction() as conn:
        deployments.promote(conn, model, 2, **WHO)
    assert (_deliver(), _aliases(model)) == (1, {"champion": "2"})  # and an empty slot has no alias
    with transaction() as conn:
        deployments.canary(conn, model, 1, share=0.25, **WHO)
        deployments.stop(conn, model, "challenger", **WHO)
        deployments.shadow(conn, model, 1, **WHO)
    assert (_deliver(), _aliases(model)) == (1, {"champion": "2", "shadow": "1"})
    found = httpx.get(
        f"{mlflow_server}/api/2.0/mlflow/registered-models/get", params={"name": model}, trust_env=False, timeout=60
    ).json()["registered_model"]
    tags = {tag["key"]: tag["value"] for tag in found["tags"]}
    assert tags["tunesmith.deployment"] == "generation 6: champion 2, shadow 1"
    with transaction() as conn:
        deployments.stop(conn, model, "shadow", **WHO)
    assert (_deliver(), _aliases(model)) == (1, {"champion": "2"})
    body = {"name": model, "alias": "champion", "version": "1"}  # a hand in MLflow's page
    httpx.post(f"{mlflow_server}/api/2.0/mlflow/registered-models/alias", json=body, trust_env=False, timeout=60)
    assert (_deliver(), _aliases(model)) == (0, {"champion": "1"})
    watcher = watch.Watcher("test")
    watcher.turn()  # its housekeeping, once an hour
    watcher.relay()
    assert _aliases(model) == {"champion": "2"}
    watcher.release()
    assert _deliver() == 0


def test_what_gates_say_of_a_version_that_is_judged_again_stands_in_mlflow(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str
) -> None:
    """Also of a model that never served."""
    for seed in (1, 2):
        make_version(make_draft(model, base, adapter, seed=seed))

    def tag(number: int) -> str | None:
        found = _rest("model-versions/get", name=model, version=str(number))["model_version"]
        return {t["key"]: t["value"] for t in found["tags"]}.get("tunesmith.gate")

    first = tag(1)
    for decision in ("fail", "pass"):
        with transaction() as conn:
            said = Decision(decision=decision, reasons=[])
            judgements.keep(conn, model, 2, {"metrics": {}}, said, actor="me", reason="another champion serves")
        assert (_deliver(), tag(1), tag(2)) == (1, first, decision)
    MlflowClient(mlflow_server).delete_model_version(model, "2")
    with transaction() as conn:
        judgements.keep(conn, model, 2, {"metrics": {}}, said, actor="me", reason="again")
    assert _deliver() == 1


# Sets the aliases of whatever waits, as the watcher does
DELIVERER = """
from infra.db import transaction
from registry import aliases
with transaction() as conn:
    print("begins", flush=True)
    aliases.deliver(conn)
"""


def test_who_dies_between_the_commit_and_the_alias_leaves_it_to_the_next(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str
) -> None:
    """Fault 7, with a process that is killed while MLflow has its request and has not answered."""
    make_version(make_draft(model, base, adapter))
    with transaction() as conn:
        deployments.promote(conn, model, 1, **WHO)
        assert deployments.read(conn, model).champion == 1  # what serves waits for nobody
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        child = subprocess.Popen([sys.executable, "-c", DELIVERER], env=env, stdout=subprocess.PIPE)
        try:
            silent.settimeout(60)
            asked, _ = silent.accept()
            asked.recv(100)
        finally:
            child.kill()
            child.communicate()
        asked.close()
    assert _aliases(model) == {}
    with transaction() as conn:
        assert one(conn, "select count(*) as n, max(attempts) as tries from outbox where done_at is null") == {
            "n": 1, "tries": 0,
        }  # fmt: skip
    assert (_deliver(), _aliases(model)) == (1, {"champion": "1"})


def test_deleting_a_serving_version_in_mlflow_stops_nothing(
    mlflow_server: str,
    base: bases.Base,
    adapter: Path,
    model: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    version = make_version(make_draft(model, base, adapter))
    with transaction() as conn:
        deployments.promote(conn, model, 1, **WHO)
    _deliver()
    body = {"name": model, "version": "1"}
    url = f"{mlflow_server}/api/2.0/mlflow/model-versions/delete"
    assert httpx.request("DELETE", url, json=body, trust_env=False, timeout=60).status_code == 200
    with transaction() as conn:
        aliases.reconcile(conn)
    assert _deliver() == 1
    assert f"{model}:1 serves, but was deleted in MLflow" in caplog.text
    with transaction() as conn:
        assert deployments.read(conn, model).champion == 1
        assert one(conn, "select count(*) filter (where done_at is null) as n from outbox")["n"] == 0
    assert version.folder().is_dir()
    states = {check.name: check.state for check in verify_version(model, 1)}
    assert (states["mlflow"], states["bundle"], states["ledger"]) == ("failed", "ok", "ok")


def test_curves_come_in_thousands_and_without_what_is_not_finite(
    mlflow_server: str, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    parent = mlflow.start_run(mlflow.experiment_of(model), "study", tags={"kind": "train"})
    run = mlflow.start_run(mlflow.experiment_of(model), "trial", parent=parent, params={"r": 8})
    points = [("loss", 1 / (1 + step), step) for step in range(2500)] + [("loss", float("nan"), 2500)]
    for _ in range(2):  # sent twice, as after a crash
        mlflow.log_points(run, points, at_ms=1_700_000_000_000)
    mlflow.end_run(run)
    history = _rest("metrics/get-history", run_id=run, metric_key="loss", max_results="5000")["metrics"]
    assert len(history) == 2500
    assert "1 points of run" in caplog.text
    found = _rest("runs/get", run_id=run)["run"]
    tags = {tag["key"]: tag["value"] for tag in found["data"]["tags"]}
    assert (tags["mlflow.parentRunId"], found["info"]["status"]) == (parent, "FINISHED")


def test_mlflow_that_is_down_is_one_sentence(mlflow_server: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    get_settings.cache_clear()
    for call in (lambda: mlflow.start_run(mlflow.experiment_of(model), "x"), lambda: mlflow.run_url("0" * 32)):
        with pytest.raises(Unreachable, match=r"MLflow does not answer at http://127\.0\.0\.1:9"):
            call()


def test_a_disk_that_is_full_at_sealing_keeps_nothing_and_a_retry_succeeds(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str
) -> None:
    """Fault 10: no version becomes ready, and what was half-written goes."""
    draft = make_draft(model, base, adapter)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(StoreFull, match="bundle"):
            versions.seal(draft)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = storage.root() / "bundle"
    assert not kept.exists() or [path.name for path in kept.iterdir() if not path.name.startswith(".lock")] == []
    version = make_version(draft)
    assert version.number == 1
    assert {check.state for check in verify_version(model, 1)} == {"ok", "none"}


def test_a_version_travels_by_export_and_import_with_its_evidence(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    version = make_version(make_draft(model, base, adapter))
    target = tmp_path / "deep" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # a disk that takes no more
    try:
        with pytest.raises(TunesmithError) as full:
            export_version(version, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.message == f"Writing {target} failed: File too large."
    assert list(target.parent.iterdir()) == []
    export_version(version, target)
    with pytest.raises(UsageError, match="exists already"):
        export_version(version, target)
    weights = load_file(target / "adapter/adapter_model.safetensors")
    assert len(weights) == 2
    there = import_version(target, f"{model}-b")
    assert (there.number, there.metrics, there.gate) == (1, version.metrics, version.gate)
    assert import_version(target, f"{model}-b").number == 1
    with transaction() as conn:
        assert deployments.promote(conn, f"{model}-b", 1, **WHO).changed  # on the evidence that came with it
    (target / "README.md").write_text("changed on the way")
    with pytest.raises(Refused, match=r"README\.md has digest"):
        import_version(target, f"{model}-b")


def test_what_a_run_made_here_and_comes_back_is_the_version_that_it_is(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    """Another one would have its first judgement alone, which may have passed where a later one failed."""
    version = make_version(make_draft(model, base, adapter))
    with transaction() as conn:
        conn.execute(
            "insert into run (id, model, kind, state, fingerprint, config, config_path, token)"
            " values (%s, %s, 'train', 'completed', 'f', '{}', 'm.yaml', 1)",
            (version.run_id, model),
        )
    export_version(version, tmp_path / "out")
    failed = Decision(decision="fail", reasons=["it got worse"], gates=[])
    with transaction() as conn:
        judgements.keep(conn, model, version.number, {"metrics": {}}, failed, **WHO)
    back = import_version(tmp_path / "out", model)
    assert back.number == version.number
    with transaction() as conn:
        assert (versions.evidence(conn, back.gate) or {})["decision"] == "fail"
        assert len(versions.list_versions(conn, model)) == 1


@pytest.mark.parametrize("profile", [{"format": 99}, {"format": 1}, {"format": 1, "histograms": []}])
def test_a_bundle_whose_profile_cannot_be_read_is_refused(
    base: bases.Base, adapter: Path, model: str, tmp_path: Path, profile: Any
) -> None:
    digest = versions.seal(replace(make_draft(model, base, adapter), profile=profile))
    shutil.copytree(storage.get("bundle", digest), tmp_path / "out")
    with pytest.raises(Refused, match=r"The profile\.json of the bundle in .*out cannot be read: "):
        import_version(tmp_path / "out", f"{model}-b")


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": {"loss": {"candidate": {"estimate": "a"}}}},
        {"metrics": {"loss": {"candidate": {"estimate": 1.0}}}},
        {"metrics": []},
        {"gate": {"x": 1}},
        {"gate": {"decision": "pass", "reasons": [], "approvals": "x"}},
        {"gate": {"decision": "fine", "reasons": []}},
        {"gate": {"decision": "pass", "reasons": [], "gates": [{"metric": "loss"}]}},
        {"about": {"judge": {"notes": 1}}},
        {"answers": {"a": "\0"}},
    ],
)
def test_a_bundle_whose_evaluation_could_not_be_shown_is_refused(
    base: bases.Base, adapter: Path, model: str, tmp_path: Path, damage: dict[str, Any]
) -> None:
    shutil.copytree(storage.get("bundle", versions.seal(make_draft(model, base, adapter))), tmp_path / "out")
    file = tmp_path / "out/evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    manifest = bundle.read(tmp_path / "out")
    bundle.write(tmp_path / "out", manifest)
    with pytest.raises(Refused, match=r"The evaluation\.json of the bundle in .*out cannot be read: "):
        import_version(tmp_path / "out", f"{model}-b")
    with transaction() as conn, pytest.raises(NotFound):
        versions.list_versions(conn, f"{model}-b")


def test_a_manifest_with_what_is_no_digest_is_refused(
    base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    shutil.copytree(storage.get("bundle", versions.seal(make_draft(model, base, adapter))), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/version.json").read_text())
    for wrong in ({"base": manifest["base"] | {"digest": "abc"}}, {"dataset": "x"}):
        (tmp_path / "out/version.json").write_text(json.dumps(manifest | wrong))
        with pytest.raises(Refused, match=r"version\.json is not a manifest of format 1"):
            import_version(tmp_path / "out", f"{model}-b")


def test_what_one_run_registers_twice_at_once_is_one_version(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str
) -> None:
    digest, run_id, ready = versions.seal(make_draft(model, base, adapter)), uuid.uuid4(), threading.Barrier(3)

    def register(_: int) -> int:
        ready.wait()
        return versions.register(digest, run_id=run_id).number

    with ThreadPoolExecutor(3) as pool:
        numbers = set(pool.map(register, range(3)))
    with transaction() as conn:
        listed = {row["version"] for row in versions.list_versions(conn, model)}
    client = MlflowClient(tracking_uri=mlflow_server, registry_uri=mlflow_server)
    assert {int(v.version) for v in client.search_model_versions(f"name = '{model}'")} == numbers == listed
    assert len(numbers) == 1


def test_a_number_that_was_deleted_while_mlflow_was_away_is_given_to_no_other(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = import_version(adapter, model)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    get_settings.cache_clear()
    with pytest.raises(Unreachable, match=f"{made.name} is deleted, but MLflow"):
        deletion.delete(model, made.number, **WHO)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    get_settings.cache_clear()
    assert import_version(adapter, model).number == made.number + 1
    with transaction() as conn, pytest.raises(NotFound, match="deleted it"):
        versions.get(conn, model, made.number)


@pytest.mark.parametrize("what", ["digest", "tokenizer_digest", "template_digest"])
def test_a_bundle_for_another_base_is_refused_with_both_digests(
    base: bases.Base, adapter: Path, model: str, tmp_path: Path, what: str
) -> None:
    shutil.copytree(storage.get("bundle", versions.seal(make_draft(model, base, adapter))), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/version.json").read_text())
    manifest["base"][what] = "sha256:" + "0" * 64
    (tmp_path / "out/version.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused) as caught:
        import_version(tmp_path / "out", model)
    assert manifest["base"][what] in caught.value.message
    assert getattr(base, what) in caught.value.message


def test_a_plain_adapter_is_imported_and_waits_for_its_gate(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    shutil.copytree(adapter, tmp_path / "a", dirs_exist_ok=True)
    (tmp_path / "a/tokenizer.json").write_text("{}")  # what else lies there is left behind
    template = bases.load_tokenizer(base.folder).chat_template or bases.FALLBACK_TEMPLATE
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(Refused, match=f"was made with another chat template than {base.id} has here"):
        import_version(tmp_path / "a", model)
    (tmp_path / "a/chat_template.jinja").unlink()
    made = import_version(tmp_path / "a", model)
    assert (made.method, made.base_digest, made.metrics, made.gate) == ("imported", base.digest, {}, None)
    assert "tokenizer.json" not in made.parsed.files
    with pytest.raises(Refused, match="never judged"), transaction() as conn:
        deployments.promote(conn, model, made.number, **WHO)


def test_a_version_of_another_mlflow_is_imported_as_strictly(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a staging home to this one, whose MLflow is only known by an address; and from who knows no Tunesmith."""
    staged = make_version(make_draft(model, base, adapter))
    client = MlflowClient(tracking_uri=mlflow_server, registry_uri=mlflow_server)
    client.create_registered_model(f"Foreign {model}")
    run = client.create_run(client.create_experiment(f"foreign {model}")).info
    client.log_artifacts(run.run_id, str(adapter), "model/peft")
    client.log_text(run.run_id, "x", "empty/MLmodel")
    for folder in ("model", "empty"):
        client.create_model_version(f"Foreign {model}", f"runs:/{run.run_id}/{folder}", run_id=run.run_id)
    code, out = _command("import", f"models:/{model}/1", "--mlflow", mlflow_server, "--model", f"{model}-p", "--json")
    assert (code, json.loads(out)["version"]) == (0, 1)
    with transaction() as conn:
        came = versions.get(conn, f"{model}-p", 1)
        assert (came.metrics, came.gate, came.evaluation) == (staged.metrics, staged.gate, staged.evaluation)
        assert deployments.promote(conn, f"{model}-p", 1, **WHO).changed
    with fetched_from_mlflow(mlflow_server, f"Foreign {model}", 1) as path:
        made = import_version(path, f"{model}-f")
    assert (made.method, made.base_digest, made.gate) == ("imported", base.digest, None)
    with pytest.raises(UsageError, match="holds no PEFT adapters"):
        fetch(mlflow_server, f"Foreign {model}", 2)
    with pytest.raises(NotFound):
        fetch(mlflow_server, f"Foreign {model}", 3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(Unreachable, match=r"MLflow does not answer at http://127\.0\.0\.1:9 "):
        fetch("http://127.0.0.1:9", model, 1)
    assert _command("import", "models:/x", "--mlflow", mlflow_server, "--model", f"{model}-p")[0] == 2


def fetch(url: str, name: str, number: int) -> None:
    with fetched_from_mlflow(url, name, number):
        pass


def _command(*arguments: str) -> tuple[int, str]:
    code = "from pipelines.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "damage", ["pickle", "truncated", "nan", "ia3", "link", "code", "empty", "rank", "layer", "head", "pissa", "biases"]
)
def test_a_foreign_adapter_that_is_not_sound_is_refused(
    mlflow_server: str,
    base: bases.Base,
    adapter: Path,
    model: str,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(adapter, folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "pickle":
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "nan":
        save_file({"lora_A": np.array([np.nan], np.float32)}, weights)
    elif damage == "ia3":
        config.write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": "b"}))
    elif damage == "link":
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    elif damage == "code":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_mapping": {"parent_library": "x"}}))
    elif damage in ("pissa", "biases"):
        more = {"init_lora_weights": "olora"} if damage == "pissa" else {"bias": "all"}
        config.write_text(json.dumps(json.loads(config.read_text()) | more))
    elif damage == "rank":
        monkeypatch.setenv("TUNESMITH_MAX_LORA_RANK", "3")
        get_settings.cache_clear()
    elif damage == "layer":
        save_file({name.replace("q_proj", "qkv"): value for name, value in load_file(weights).items()}, weights)
    elif damage == "head":
        head = {name.replace("model.layers.0.self_attn.q_proj", "lm_head"): v for name, v in load_file(weights).items()}
        save_file(head, weights)
    else:
        save_file({}, weights)
    said = {
        "rank": "is 4, and engines here take 3 at most", "layer": "no linear layer .*qkv",
        "head": "it changes lm_head, and engines here take no adapter of the output",
        "pissa": "was initialised by olora", "biases": "also trains biases",
    }.get(damage)  # fmt: skip
    with pytest.raises(Refused, match=said):
        import_version(folder, model)
    assert not storage.where("bundle", "sha256:" + "0" * 64).parent.exists() or not list(
        storage.where("bundle", "sha256:" + "0" * 64).parent.iterdir()
    )
    with transaction() as conn, pytest.raises(NotFound):
        versions.list_versions(conn, model)


def test_the_commands_around_a_version(
    mlflow_server: str, base: bases.Base, adapter: Path, model: str, tmp_path: Path
) -> None:
    run = _command
    for seed, gain in ((1, 0.1), (2, 0.6)):
        make_version(make_draft(model, base, adapter, gain=gain, seed=seed))
    code, out = run("show", f"{model}:2", "--json")
    shown = json.loads(out)
    assert (code, shown["gate"]["decision"], shown["base"]["digest"]) == (0, "pass", base.digest)
    assert shown["evaluation"]["metrics"]["loss"]["vs_base"]["high"] < 0
    assert shown["mlflow_url"].startswith(mlflow_server)
    code, out = run("compare", f"{model}:1", f"{model}:2", "--json")
    compared = json.loads(out)
    assert (code, compared["metrics"]["loss"]["better"]) == (0, "b")
    assert compared["differences"]["params"]["b"]["seed"] == 2
    code, out = run("import", str(adapter), "--model", f"{model}-c", "--json")
    assert (code, json.loads(out)["version"]) == (0, 1)
    code, out = run("export", f"{model}:1", str(tmp_path / "out"), "--json")
    assert (code, (tmp_path / "out/adapter/adapter_model.safetensors").is_file()) == (0, True)
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == base.id, "and no folder of this machine's"
    assert run("export", f"{model}:1", str(tmp_path / "hub"), "--hub")[0] == 0
    assert {f.name for f in (tmp_path / "hub").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(tmp_path / "hub").base_model_name_or_path == base.id
    assert ModelCard.load(tmp_path / "hub/README.md").data.base_model is None, "a folder is no name on the hub"
    assert run("export", f"{model}:1", str(tmp_path / "hub"), "--hub")[0] == 2, "it is there already"
    code, out = run("verify", f"{model}:1", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    with transaction() as conn:
        weights = versions.get(conn, model, 1).folder() / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, out = run("verify", f"{model}:1", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert (code, checks["bundle"]["state"], checks["mlflow"]["state"]) == (1, "failed", "ok")
    assert "adapter_model.safetensors has digest" in checks["bundle"]["detail"]
    template = base.folder / "chat_template.jinja"
    kept = template.read_bytes()
    try:
        template.write_bytes(kept + b" ")
        checks = {check["name"]: check for check in json.loads(run("verify", f"{model}:2", "--json")[1])["checks"]}
    finally:
        template.write_bytes(kept)
    assert (checks["base"]["state"], checks["bundle"]["state"]) == ("failed", "ok")
    assert "was changed where it is kept" in checks["base"]["detail"]
    code, out = run("export", f"{model}:1", str(tmp_path / "damaged"))
    assert (code, (tmp_path / "damaged").exists()) == (3, False)
    for line in (f"show {model}:2", f"compare {model}:1 {model}:2", f"versions {model}"):
        code, out = run(*line.split())
        assert code == 0
        assert "loss" in out
        print(out)


def test_a_deleted_version_leaves_store_and_mlflow_and_its_number_is_not_given_again(
    base: bases.Base, adapter: Path, model: str, mlflow_server: str
) -> None:
    first, second = (make_version(make_draft(model, base, adapter, seed=seed)) for seed in (1, 2))
    assert deletion.delete(model, second.number, **WHO)[0] is True
    assert not storage.has("bundle", second.bundle_digest)
    assert storage.has("bundle", first.bundle_digest)
    client = MlflowClient(mlflow_server)
    assert [int(v.version) for v in client.search_model_versions(f"name = '{model}'")] == [first.number]
    with pytest.raises(Exception, match=f"{second.mlflow_model_id}|not found|deleted"):
        client.get_logged_model(str(second.mlflow_model_id))
    assert make_version(make_draft(model, base, adapter, seed=3)).number == second.number + 1
