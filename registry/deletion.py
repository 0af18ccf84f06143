"""Deleting a version that never held a slot: its row, its bundle and its copy in MLflow go; that it was there, its
evidence, who took it away and why stay for ever."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra import storage
from infra.db import Connection, load_queries, one, transaction
from infra.errors import Refused, Unreachable
from registry import deployments, mlflow, versions

SQL = load_queries(Path(__file__).with_suffix(".sql"))


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """Who deleted a version, when and why; `bundle_digest` is what it was."""

    model: str
    number: int
    at: datetime
    actor: str
    reason: str
    bundle_digest: str
    mlflow_model_id: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "version": self.number,
            "at": self.at.astimezone(UTC),
            "actor": self.actor,
            "reason": self.reason,
            "bundle": self.bundle_digest,
        }


def delete(model: str, number: int, *, actor: str, reason: str) -> tuple[bool, Deletion]:
    """Delete a version; whether it was still there, and the record of it.

    First the row goes, with the record, then MLflow's copy and the bundle: a call that is repeated finishes what an
    earlier one began. Raises NotFound for no such version; Refused while one could be rolled back to it, since it
    serves or served, or a running search starts from it; UsageError without a reason; Unreachable when the row is
    gone and MLflow does not answer.
    """
    with transaction() as conn:
        now = read(conn, model, number)
        new = now is None
        if now is None:
            now = _take_away(conn, model, number, actor=actor, reason=reason)
    try:
        mlflow.delete_version(model, number, now.mlflow_model_id)
    except Unreachable as error:
        raise Unreachable(
            f"{model}:{number} is deleted, but MLflow, which still has a copy, does not answer.",
            hint="Run the same command again when it does.",
        ) from error
    with transaction() as conn:
        conn.execute(SQL["no_new_versions"])
        if not one(conn, SQL["still_used"], {"digest": now.bundle_digest})["used"]:
            storage.remove("bundle", now.bundle_digest)
    return new, now


def read(conn: Connection, model: str, number: int) -> Deletion | None:
    """The record of a version that was deleted, or None."""
    row = conn.execute(SQL["get"], {"model": model, "number": number}).fetchone()
    return Deletion(**row) if row else None


def _take_away(conn: Connection, model: str, number: int, *, actor: str, reason: str) -> Deletion:
    """Row and record in one transaction, under the lock that every change of the deployment takes."""
    said = deployments.check_reason(reason, required=True)
    deployments.lock(conn, model)
    version = versions.get(conn, model, number)
    place = {"model": model, "number": number}
    if one(conn, SQL["needed_by_ledger"], place)["needed"]:
        raise Refused(
            f"{version.name} is not deleted: it serves or served, and the ledger must be able to bring it back.",
            hint="Only a version that never held a slot can be deleted.",
        )
    if (study := conn.execute(SQL["studies"], {"digest": version.bundle_digest}).fetchone()) is not None:
        raise Refused(
            f"{version.name} is not deleted: the search {study['name']} starts from it.",
            hint=f"Wait for it, or use `tunesmith study stop {study['name']}`.",
        )
    kept = {name: getattr(version, name) for name in ("bundle_digest", "mlflow_model_id", "evaluation", "gate")}
    record = one(conn, SQL["note"], {**place, **kept, "actor": actor, "reason": said})
    conn.execute(SQL["delete"], place)
    return Deletion(**record)
