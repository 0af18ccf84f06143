"""Golden sets asked again: what was kept of it, and whether a version answers worse than when it was judged.

The rows are asked, and answers scored, by pipelines/rescoring.py. What serves is checked file by file and the questions
stay the same, so answers that got worse are never what people ask: something changed that the version stands on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries, one
from registry.statistics import in_words

SQL = load_queries(Path(__file__).with_suffix(".sql"))

LEVEL = 0.99  # of the difference's interval: a golden set is asked again and again


def keep(
    conn: Connection,
    model: str,
    version: int,
    *,
    metric: str,
    rows: int,
    failed: int,
    score: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    difference: Mapping[str, Any] | None,
    changed: Mapping[str, Any],
    answers: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Keep what asking again gave, and return it with its time, as `newest` does. `changed` is ``{"worse": rows,
    "better": rows, "examples": [{"row", "question", "expected", "then", "now", "score", "reference"}]}``, `answers` are
    by row, where there were none to hold them against."""
    values = {
        "score": Jsonb(score),
        "reference": Jsonb(reference) if reference is not None else None,
        "difference": Jsonb(difference) if difference is not None else None,
        "changed": Jsonb(changed),
        "answers": Jsonb(answers) if answers is not None else None,
    }
    known = {"model": model, "version": version, "metric": metric, "rows": rows, "failed": failed}
    return dict(one(conn, SQL["keep"], known | values))


def first_answers(conn: Connection, model: str, version: int) -> dict[str, str] | None:
    """By row, what a version answered when it was first asked again, where its judgement kept no answers."""
    row = conn.execute(SQL["first_answers"], {"model": model, "version": version}).fetchone()
    return row["answers"] if row else None


def newest(conn: Connection, model: str, version: int, limit: int = 1) -> Sequence[dict[str, Any]]:
    """The last rescorings of a version, the newest first."""
    return conn.execute(SQL["newest"], {"model": model, "version": version, "limit": limit}).fetchall()


def drop_old(conn: Connection, days: int) -> None:
    """Forget rescorings older than `days`, but for what later ones are held against."""
    conn.execute(SQL["drop_old"], {"days": days})


def in_a_sentence(rescoring: Mapping[str, Any]) -> str:
    """How well a version did."""
    name, metric, rows = f"{rescoring['model']}:{rescoring['version']}", rescoring["metric"], rescoring["rows"]
    said = f"{name} answers {rows} golden rows with a {metric} of {in_words(rescoring['score'])}"
    if rescoring["failed"]:
        said += f" ({rescoring['failed']} without an answer)"
    if rescoring["difference"] is None:
        return f"{said}; there were no answers to hold them against, so later ones are held against these."
    changed = rescoring["changed"]
    return (
        f"{said}, {in_words(rescoring['reference'])} before: a difference of {in_words(rescoring['difference'])} "
        f"({rescoring['difference']['level']:.0%} interval); {changed['worse']} are worse, {changed['better']} better."
    )
