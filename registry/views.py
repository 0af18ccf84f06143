"""What the registry says of itself, as the JSON that commands print and the control API answers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from infra.db import Connection
from infra.errors import NotFound, Unreachable
from registry import approvals, bundle, deployments, judgements, mlflow, signatures, versions
from registry.names import Ref

_TIMED = ("p95_latency_ms", "p95_latency_at_load_ms", "tokens_per_second")
_COMPARED = ("base", "prompt", "hosted", "generation", "dataset", "method", "study", "params", "code_version")


def list_versions(conn: Connection, model: str) -> dict[str, Any]:
    """``{"model", "versions": [...]}``, oldest first, each with the slot it holds. Raises NotFound."""
    found = versions.list_versions(conn, model)
    now = deployments.read(conn, model)
    for row in found:
        row["created_at"], row["serving"] = row["created_at"].astimezone(UTC), now.slot_of(row["version"])
    return {"model": model, "versions": found}


def describe(conn: Connection, ref: Ref) -> dict[str, Any]:
    """One version with its lineage, its evaluation and the gate's decision. Raises NotFound."""
    found = versions.find(conn, ref)
    evaluation, gate = versions.evidence(conn, found.evaluation), versions.evidence(conn, found.gate)
    try:
        page = mlflow.version_url(found.model, found.number)
    except Unreachable:
        page = None
    try:
        signed_by = signatures.signer(found.folder())
    except NotFound:  # on a machine that sees the database only
        signed_by = None
    of = found.manifest.get
    return {
        "model": found.model,
        "version": found.number,
        "created_at": found.created_at.astimezone(UTC),
        "serving": deployments.read(conn, found.model).slot_of(found.number),
        "method": found.method,
        "base": of("base"),
        "prompt": of("prompt"),
        "hosted": of("hosted"),
        "generation": of("generation"),
        "dataset": of("dataset"),
        "study": found.study,
        "trial": of("trial"),
        "params": of("params"),
        "code_version": of("code_version"),
        "environment": of("files", {}).get(bundle.ENVIRONMENT),
        "bundle": found.bundle_digest,
        "signed_by": signed_by,
        "run_id": found.run_id,
        "mlflow_run_id": found.mlflow_run_id,
        "mlflow_url": page,
        "metrics": found.metrics,
        "gate": gate
        and {name: gate[name] for name in ("decision", "reasons", "gates", "champion") if name in gate}
        | {"evidence": found.gate},
        "judged_again": judgements.newest(conn, found.model, found.number),
        "approvals": approvals.of(conn, found.model, found.number).to_json(),
        "evaluation": evaluation and {k: evaluation[k] for k in ("metrics", "slices", "rows") if k in evaluation},
    }


def compare(conn: Connection, first: Ref, second: Ref) -> dict[str, Any]:
    """Two versions by their own evaluations: ``{"a", "b", "metrics": {name: {"a", "b", "better"}}, "differences",
    "same_rows"}``. Raises NotFound."""
    a, b = (versions.find(conn, ref) for ref in (first, second))
    evaluated = [versions.evidence(conn, version.evaluation) or {"metrics": {}} for version in (a, b)]
    left, right = (evaluation["metrics"] for evaluation in evaluated)
    metrics = {}
    for name in sorted(left.keys() | right.keys()):
        pair = [side.get(name, {}).get("candidate") for side in (left, right)]
        # Speed was measured at other times, beside other work: it is compared within one evaluation only
        better = None if name in _TIMED else _better(pair[0], pair[1])
        metrics[name] = {"a": pair[0], "b": pair[1], "better": better}
    sides = {key: {"a": a.manifest.get(key), "b": b.manifest.get(key)} for key in _COMPARED}
    return {
        "a": a.name,
        "b": b.name,
        "metrics": metrics,
        "differences": {key: pair for key, pair in sides.items() if pair["a"] != pair["b"]},
        "same_rows": a.dataset_digest is not None and a.dataset_digest == b.dataset_digest,
    }


def history(conn: Connection, model: str, at: datetime | None = None) -> dict[str, Any]:
    """The ledger, oldest entry first; with `at` up to that time, and what served then. Raises NotFound."""
    entries = deployments.history(conn, model, at)
    body: dict[str, Any] = {"model": model, "entries": [entry.to_json() for entry in entries]}
    if at is None:
        return body
    return {**body, "at": at.astimezone(UTC), "serving": deployments.replay(model, entries).to_json()}


def _better(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str | None:
    """Whose interval lies wholly on the better side of the other's; a paired test would see smaller differences."""
    if a is None or b is None or None in (a["low"], a["high"], b["low"], b["high"]):
        return None
    if a["low"] > b["high"]:
        return "a" if a["higher_is_better"] else "b"
    if b["low"] > a["high"]:
        return "b" if a["higher_is_better"] else "a"
    return None
