"""Versions: immutable bundles of a model, numbered by MLflow's registry, kept by digest in our own store."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from infra import storage
from infra.db import Connection, load_queries, transaction
from infra.errors import NotFound, Refused, TunesmithError, UsageError
from registry import bundle, card, datasets, deployments, environment, mlflow, servable, signatures, upstreams
from registry.bundle import BaseIdentity, Generation, Hosted, Manifest, Prompt, canonical_json
from registry.evidence import evidence, keep_evidence
from registry.gates import Decision
from registry.names import MODEL_NAME, Ref, check_model_name, parse_ref, parse_version

if TYPE_CHECKING:
    from registry.bases import Base

__all__ = [
    "MODEL_NAME",
    "Ref",
    "Version",
    "VersionDraft",
    "check_model_name",
    "evidence",
    "keep_evidence",
    "parse_ref",
    "parse_version",
]

SQL = load_queries(Path(__file__).with_suffix(".sql"))


@dataclass(frozen=True, kw_only=True)
class VersionDraft:
    """All that is sealed into a bundle. `adapter` is a folder with a plain PEFT adapter, or None for a prompt on the
    base, or for what is `hosted`; `evaluation` and `profile` are JSON; `decision` is the gate's, None when none was
    asked."""

    model: str
    method: str
    base: Base
    adapter: Path | None
    system: str | None = None
    hosted: Hosted | None = None
    generation: Generation = field(default_factory=Generation)
    dataset: str | None = None
    study: str | None = None
    trial: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    decision: Decision | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)
    report_html: str | None = None
    code_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class Version:
    """A row of `version`. `evaluation` and `gate` are digests of evidence; `manifest` is version.json."""

    model: str
    number: int
    created_at: datetime
    bundle_digest: str
    base_digest: str
    dataset_digest: str | None
    method: str
    study: str | None
    run_id: uuid.UUID | None
    mlflow_run_id: str | None
    mlflow_model_id: str | None
    manifest: dict[str, Any]
    metrics: dict[str, float | None]
    evaluation: str | None
    gate: str | None
    profile: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model}:{self.number}"

    def outline(self) -> dict[str, Any]:
        """Its model, number, method and bundle, as JSON for whoever registered it."""
        return {"model": self.model, "version": self.number, "method": self.method, "bundle": self.bundle_digest}

    @property
    def parsed(self) -> Manifest:
        return Manifest.model_validate(self.manifest)

    def folder(self) -> Path:
        """The bundle in the artifact store, to be read only and not yet verified. Raises NotFound."""
        return storage.get("bundle", self.bundle_digest)

    def adapter(self) -> Path | None:
        """The PEFT adapter's folder, or None for a version without one. Raises NotFound."""
        return self.folder() / "adapter" if self.parsed.has_adapter else None


def seal(draft: VersionDraft, *, signed: bool = True) -> str:
    """Write a draft's bundle into the artifact store and return its digest, so that what will be registered is what
    was judged. The same draft gives the same digest. It is `signed`, where there is a key, unless nobody vouches for
    it. Raises Refused for an adapter that may not be kept."""
    check_model_name(draft.model)
    with storage.scratch("bundle") as folder:
        digest = bundle.write(folder, _fill(folder, draft))
        bundle.verify(folder, digest)
        if signed:
            signatures.sign(folder)
        signatures.adopt(folder, storage.keep("bundle", digest, folder))
    return digest


def of_run(conn: Connection, model: str, run_id: uuid.UUID) -> Version | None:
    """What a run, or an import, registered."""
    row = conn.execute(SQL["by_run"], {"model": model, "run_id": run_id}).fetchone()
    return Version(**row) if row is not None else None


def made_here(conn: Connection, model: str, digest: str) -> Version | None:
    """The version that a run of ours made of a bundle."""
    row = conn.execute(SQL["made_here"], {"model": model, "digest": digest}).fetchone()
    return Version(**row) if row is not None else None


def register(
    digest: str,
    *,
    run_id: uuid.UUID,
    mlflow_run_id: str | None = None,
    imported_by: str | None = None,
    vouched: bool = True,
    guard: Callable[[Connection], None] | None = None,
) -> Version:
    """Make a sealed bundle of the artifact store a version: first in MLflow, with lineage, then our row.

    Idempotent by `run_id`: the row of an earlier call is returned; after a crash between MLflow and our row, the
    version that MLflow already has is taken up. `mlflow_run_id` is the run that made it; one is made when it is None.
    Unless it is `vouched` for, a gate's pass in it, which anybody could have written, does not count. `guard` is
    called in each transaction, to refuse a run that lost its lease.

    Raises NotFound for no such bundle, or upstream, Refused when it is not what was sealed or no engine could serve it,
    Unreachable without MLflow.
    """
    folder = storage.get("bundle", digest)
    manifest = bundle.verify(folder, digest)
    model = check_model_name(manifest.model)
    with transaction() as conn:
        if guard is not None:
            guard(conn)
        found = of_run(conn, model, run_id)
    if found is not None:
        return found
    if manifest.has_adapter:
        servable.check(folder / "adapter", storage.get("base", manifest.base.digest))
    if manifest.hosted is not None:
        with transaction() as conn:
            upstreams.check(conn, manifest.hosted)
    evaluation = _json(folder / "evaluation.json")
    gate = evaluation.pop("gate", None) if evaluation else None
    if not vouched and gate and gate["decision"] != "fail":
        gate = None
    metrics = headline(evaluation)
    run = mlflow_run_id or mlflow.start_run(
        mlflow.experiment_of(model), f"{manifest.method} {str(run_id)[:8]}", key=str(run_id), params=manifest.params
    )
    registered = _register_in_mlflow(
        model,
        run_id=run,
        folder=folder,
        bundle_digest=digest,
        key=str(run_id),
        metrics={name: value for name, value in metrics.items() if value is not None},
        tags={
            "tunesmith.base": f"{manifest.base.id}@{manifest.base.revision}",
            "tunesmith.base_digest": manifest.base.digest,
            "tunesmith.dataset": manifest.dataset,
            "tunesmith.study": manifest.study,
            "tunesmith.trial": manifest.trial,
            "tunesmith.method": manifest.method,
            "tunesmith.code_version": manifest.code_version,
            "tunesmith.gate": gate["decision"] if gate else None,
            "tunesmith.imported_by": imported_by,
        },
        params=manifest.params,
        card=(folder / "README.md").read_text(encoding="utf-8") if "README.md" in manifest.files else "",
    )
    if "report.html" in manifest.files:
        mlflow.log_file(run, folder / "report.html")
    if mlflow_run_id is None:
        mlflow.end_run(run)
    with transaction() as conn:
        if guard is not None:
            guard(conn)
        conn.execute(SQL["ensure_model"], {"model": model})
        conn.execute(
            SQL["insert"],
            {
                "model": model,
                "number": registered.number,
                "bundle_digest": digest,
                "base_digest": manifest.base.digest,
                "dataset_digest": manifest.dataset if _has_dataset(conn, manifest.dataset) else None,
                "method": manifest.method,
                "study": manifest.study,
                "run_id": run_id,
                "mlflow_run_id": run,
                "mlflow_model_id": registered.model_id,
                "manifest": Jsonb(manifest.model_dump(mode="json")),
                "metrics": Jsonb(metrics),
                "evaluation": keep_evidence(conn, "evaluation", evaluation) if evaluation else None,
                "gate": keep_evidence(conn, "gate", gate) if gate else None,
                "profile": Jsonb(_json(folder / "profile.json") or {}),
                "imported_by": imported_by,
            },
        )
        version = of_run(conn, model, run_id) or get(conn, model, registered.number)
        version.folder()  # a deletion of the same bundle may have taken it away meanwhile
    if version.run_id == run_id and version.number != registered.number:  # two calls at once: the first one's counts
        mlflow.delete_version(model, registered.number, registered.model_id)
    if version.run_id != run_id:
        raise TunesmithError(
            f"MLflow gave {version.name} to a second registration: its registry was emptied or swapped.",
            hint="Use the MLflow server that this home began with.",
        )
    return version


def _register_in_mlflow(model: str, **values: Any) -> mlflow.Registered:
    """As `mlflow.register_version`, and never a number that was deleted here: a deletion that MLflow has not heard of,
    since it was away, is finished first."""
    while True:
        found = mlflow.register_version(model, **values)
        with transaction() as conn:
            if conn.execute(SQL["deleted"], {"model": model, "number": found.number}).fetchone() is None:
                return found
        mlflow.delete_version(model, found.number, found.model_id)


def sign(model: str, number: int) -> str:
    """Sign a version's files, MLflow's copy too, with the key that the settings name, as is done to new ones anyway;
    the key's name.

    Raises NotFound, Refused for files that are not what was sealed, UsageError without a key, Unreachable when MLflow
    did not get the signature.
    """
    with transaction() as conn:
        version = get(conn, model, number)
    bundle.verify(version.folder(), version.bundle_digest)
    if (key := signatures.sign(version.folder())) is None:
        raise UsageError("There is no key to sign with.", hint="Set TUNESMITH_SIGNING_KEY to a private key's file.")
    if version.mlflow_model_id is not None:
        mlflow.add_to_model(version.mlflow_model_id, version.folder() / bundle.SIGNATURE)
    return key


def get(conn: Connection, model: str, number: int) -> Version:
    """One version. Raises NotFound, UsageError for a name that cannot be one."""
    check_model_name(model)
    row = conn.execute(SQL["get"], {"model": model, "number": number}).fetchone()
    if row is None:
        gone = conn.execute(SQL["deleted"], {"model": model, "number": number}).fetchone()
        was = f": {gone['actor']} deleted it ({gone['reason']})" if gone else ""
        raise NotFound(f"There is no version {model}:{number}{was}.", hint=f"See `tunesmith versions {model}`.")
    return Version(**row)


def find(conn: Connection, ref: Ref) -> Version:
    """The version a reference means now. Raises NotFound when there is none, or nothing holds the slot."""
    if ref.number is not None:
        return get(conn, ref.model, ref.number)
    number: int | None = getattr(deployments.read(conn, ref.model), ref.slot)
    if number is None:
        raise NotFound(f"{ref.model} has no {ref.slot}.", hint=f"See `tunesmith versions {ref.model}`.")
    return get(conn, ref.model, number)


def list_versions(conn: Connection, model: str) -> list[dict[str, Any]]:
    """All versions of a model, oldest first: version, created_at, base (its id), method, metrics, gate (its decision,
    None when never judged), dataset, study. Raises NotFound for no such model."""
    check_model_name(model)
    if conn.execute(SQL["model_exists"], {"model": model}).fetchone() is None:
        raise NotFound(f"There is no model {model}.", hint="See `tunesmith models`.")
    return conn.execute(SQL["list"], {"model": model}).fetchall()


def list_models(conn: Connection) -> list[dict[str, Any]]:
    """Models with a version, by name: model, created_at, generation, champion, challenger, challenger_share, shadow,
    versions. A run that was refused leaves a model without one."""
    return list(conn.execute(SQL["models"]))


def headline(evaluation: Mapping[str, Any] | None) -> dict[str, float | None]:
    """A version's headline numbers: the candidate's estimate of each metric."""
    if evaluation is None:
        return {}
    return {
        name: measured["candidate"]["estimate"]
        for name, measured in evaluation["metrics"].items()
        if measured.get("candidate") is not None
    }


@lru_cache(maxsize=1)
def code_version() -> str:
    """This program's version, with the commit when it runs from a checkout; ``.dirty`` where that has changes since."""
    version = importlib.metadata.version("tunesmith")
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():  # installed: a repository further up would be somebody else's
        return version

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, timeout=5, check=True)

    try:
        done, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+g{done.stdout.strip()}{'.dirty' if changed.stdout.strip() else ''}"


def _has_dataset(conn: Connection, digest: str | None) -> bool:
    """A bundle from elsewhere names a data set that may not be here; its manifest goes on naming it."""
    return conn.execute(SQL["dataset_exists"], {"digest": digest}).fetchone() is not None


def _json(path: Path) -> dict[str, Any] | None:
    import orjson

    if not path.is_file():
        return None
    value = orjson.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise Refused(f"{path.name} in {path.parent} is not a JSON object.")
    return value


def _name_base(file: Path, base: BaseIdentity) -> None:
    """Have PEFT's config name the base as the world does: what trained knows it as a folder of this machine's."""
    config = json.loads(file.read_bytes())
    commit = re.fullmatch(r"[0-9a-f]{40}", base.revision) is not None
    config |= {"base_model_name_or_path": base.id, "revision": base.revision if commit else None}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fill(folder: Path, draft: VersionDraft) -> Manifest:
    """Put all but version.json into the folder; what is written depends on the draft alone, not on time."""
    base = BaseIdentity(
        id=draft.base.id,
        revision=draft.base.revision,
        digest=draft.base.digest,
        tokenizer_digest=draft.base.tokenizer_digest,
        template_digest=draft.base.template_digest,
        dtype=draft.base.dtype,
    )
    manifest = Manifest(
        model=draft.model,
        method=draft.method,
        base=base,
        prompt=Prompt(system=draft.system),
        hosted=draft.hosted,
        generation=draft.generation,
        dataset=draft.dataset,
        study=draft.study,
        trial=draft.trial,
        params=dict(draft.params),
        training=dict(draft.training) if draft.training is not None else None,
        code_version=draft.code_version or code_version(),
    )
    if draft.adapter is not None:
        (folder / "adapter").mkdir()
        for name in (bundle.ADAPTER_CONFIG, bundle.ADAPTER_WEIGHTS):
            source = draft.adapter / Path(name).name
            if source.is_symlink() or not source.is_file():
                raise Refused(f"The adapter in {draft.adapter} has no plain file {source.name}.")
            shutil.copyfile(source, folder / name)
        _name_base(folder / bundle.ADAPTER_CONFIG, base)
    (folder / bundle.ENVIRONMENT).write_text(canonical_json(environment.lock()), encoding="utf-8")
    sources: Sequence[Mapping[str, Any]] = ()
    if draft.dataset is not None and storage.has("dataset", draft.dataset):
        made_of = datasets.open_dataset(draft.dataset)
        sources = made_of.sources
        facts = {"counts": dict(made_of.counts), "sources": list(sources), "parent": made_of.parent}
        (folder / bundle.DATA).write_text(canonical_json(facts), encoding="utf-8")
    (folder / "profile.json").write_text(canonical_json(dict(draft.profile)), encoding="utf-8")
    if draft.evaluation is not None:
        text = canonical_json({**draft.evaluation, "gate": draft.decision.to_json() if draft.decision else None})
        (folder / "evaluation.json").write_text(text, encoding="utf-8")
    if draft.report_html is not None:
        (folder / "report.html").write_text(draft.report_html, encoding="utf-8")
    text = card.render(manifest, draft.evaluation, draft.decision, sources)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return manifest
