"""Later judgements of a version: the newest is what its gates say from then on (the view `judged`).

A champion changes, and a version that was compared with the one before is then promoted on evidence about another
question. Judged again beside the one that serves, it need not be made again. The first judgement stays in the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries
from registry import deployments, versions
from registry.evidence import keep_evidence
from registry.gates import Decision

SQL = load_queries(Path(__file__).with_suffix(".sql"))


def keep(
    conn: Connection, model: str, number: int, evaluation: Mapping[str, Any], decision: Decision, *, actor: str,
    reason: str, report: str | None = None,
) -> None:  # fmt: skip
    """Have a version's gates speak by this judgement from now on, in MLflow too; `report` is its page, as HTML. Raises
    UsageError without a reason."""
    conn.execute(
        SQL["keep"],
        {
            "model": model,
            "number": number,
            "actor": actor,
            "reason": deployments.check_reason(reason, required=True),
            "metrics": Jsonb(versions.headline(evaluation)),
            "evaluation": keep_evidence(conn, "evaluation", evaluation),
            "gate": keep_evidence(conn, "gate", decision.to_json()),
            "decision": decision.decision,
            "report": report,
        },
    )
    conn.execute(SQL["enqueue"], {"model": model})


def newest(conn: Connection, model: str, number: int) -> Mapping[str, Any] | None:
    """When, by whom and why a version was last judged again: at, actor, reason; None if it never was."""
    return conn.execute(SQL["newest"], {"model": model, "number": number}).fetchone()


def report(conn: Connection, model: str, number: int) -> str | None:
    """The page of the newest judgement, as HTML; None if it has none, or the version was judged but once."""
    row = conn.execute(SQL["report"], {"model": model, "number": number}).fetchone()
    return row["report"] if row else None
