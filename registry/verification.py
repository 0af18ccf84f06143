"""Is a version still exactly what was judged? Its files and their signature, its evidence, MLflow's copy, its base, and
the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from infra import storage
from infra.db import transaction
from infra.errors import NotFound, TunesmithError, Unreachable
from registry import bases, bundle, datasets, deployments, mlflow, signatures, upstreams, versions
from registry.versions import Version

State = Literal["ok", "failed", "unreachable", "none"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at; `none`: the version has no such thing, or it cannot be checked here."""

    name: str
    state: State
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_version(model: str, number: int) -> list[Check]:
    """Look at all a version stands on; a failed check does not keep the others from being made.

    Raises NotFound for no such version, Unreachable without the database.
    """
    with transaction() as conn:
        version = versions.get(conn, model, number)
        problems = deployments.verify_chain(conn, model)
        length = deployments.read(conn, model).generation
        evidence = _check("evidence", lambda: _evidence(version, lambda digest: versions.evidence(conn, digest)))
    whole = f"{length} entries, chained"
    hosted = version.parsed.hosted
    return [
        _check("bundle", lambda: _bundle(version)),
        _signature(version),
        evidence,
        _check("mlflow", lambda: _mlflow(version)),
        _check("base", lambda: bases.check(version.base_digest)),
        *([_check("upstreams", lambda: _upstreams(hosted))] if hosted is not None else []),
        _check("dataset", lambda: version.dataset_digest and datasets.check(version.dataset_digest)),
        Check(name="ledger", state="failed" if problems else "ok", detail=" ".join(problems) or whole),
    ]


def report(model: str, number: int) -> dict[str, Any]:
    """`verify_version` as ``verify --json`` prints it."""
    checks = verify_version(model, number)
    sound = all(check.state != "failed" for check in checks)
    return {"model": model, "version": number, "ok": sound, "checks": [check.to_json() for check in checks]}


def _check(name: str, look: Callable[[], str | None]) -> Check:
    try:
        detail = look()
    except Unreachable as error:
        return Check(name=name, state="unreachable", detail=error.message)
    except TunesmithError as error:
        return Check(name=name, state="failed", detail=error.message)
    return Check(name=name, state="none" if detail is None else "ok", detail=detail or "")


def _bundle(version: Version) -> str:
    manifest = bundle.verify(version.folder(), version.bundle_digest)
    if manifest != version.parsed:
        raise TunesmithError("The manifest in the database is not the bundle's.")
    return f"{len(manifest.files) + 1} files, {version.bundle_digest}"


def _signature(version: Version) -> Check:
    def look() -> str | None:
        key = signatures.demand(version.name, version.folder())
        return key and f"by the key {key}"

    check = _check("signature", look)
    if check.state == "none" and (key := signatures.signer(version.folder())) is not None:
        return replace(check, detail=f"not checked, since no key is trusted here: it says it is by {key}")
    return check


def _evidence(version: Version, read: Callable[[str], dict[str, Any] | None]) -> str | None:
    digests = [digest for digest in (version.evaluation, version.gate) if digest is not None]
    for digest in digests:
        if storage.text_digest(bundle.canonical_json(read(digest))) != digest:
            raise TunesmithError(f"The evidence {digest} was changed after it was written.")
    gate = (read(version.gate) if version.gate is not None else None) or {}
    if gate.get("evaluation") not in (None, version.evaluation):
        raise TunesmithError(f"The gate's decision is of the evaluation {gate['evaluation']}, and not of its own.")
    return f"{len(digests)} kept" if digests else None


def _mlflow(version: Version) -> str:
    with tempfile.TemporaryDirectory(prefix="tunesmith-verify-") as scratch:
        try:
            copy = mlflow.download_version(version.model, version.number, Path(scratch))
        except NotFound as error:
            raise TunesmithError(f"{version.name} was deleted in MLflow; it is still served from the store.") from error
        bundle.verify(copy, version.bundle_digest)
    return f"the same files, model {version.mlflow_model_id}"


def _upstreams(hosted: bundle.Hosted) -> str:
    with transaction() as conn:
        found = [upstreams.get(conn, each.upstream) for each in hosted.models]
    return ", ".join(f"{each.model} at {there.url}" for each, there in zip(hosted.models, found, strict=True))
