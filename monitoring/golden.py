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
from monitoring import alerts, figures
from registry.statistics import in_words

SQL = load_queries(Path(__file__).with_suffix(".sql"))

LEVEL = 0.99  # of the difference's interval: a golden set is asked again and again
_CLEAR = 0.5  # of the interval's reach above its middle, within which there must be no loss for an alert to close


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
    judge: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keep what asking again gave, and return it with its time, as `newest` does. `changed` is ``{"worse": rows,
    "better": rows, "examples": [{"row", "question", "expected", "then", "now", "score", "reference"}]}``, `answers` are
    by row, where there were none to hold them against. `judge`, where one scored, is ``{"served", "version", "then":
    {"served", "version", "score" or null} or null}``: what it is called, by which name it scored the answers of then,
    and how, if all of these were scored again."""
    values = {
        "score": Jsonb(score),
        "reference": Jsonb(reference) if reference is not None else None,
        "difference": Jsonb(difference) if difference is not None else None,
        "changed": Jsonb(changed),
        "answers": Jsonb(answers) if answers is not None else None,
        "judge": Jsonb(judge) if judge is not None else None,
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


def state(difference: Mapping[str, Any] | None) -> alerts.State:
    """`over` when a difference is a loss for sure, `calm` when even half of its interval has room for none, and between
    these `between`; `unknown` where there is no interval."""
    if difference is None or difference["high"] is None:
        return "unknown"
    if difference["high"] < 0:
        return "over"
    middle = difference["estimate"]
    return "calm" if middle + _CLEAR * (difference["high"] - middle) >= 0 else "between"


def look(conn: Connection, model: str, version: int) -> alerts.Finding:
    """What a version's last rescoring means for its alert. A hosted model may be another one behind its name; of all
    other versions the files are those that were judged, so that it is what they are served by."""
    found = newest(conn, model, version)
    if not found:
        return alerts.Finding(rule=alerts.GOLDEN, state="unknown")
    (rescoring,) = found
    hosted = one(conn, SQL["hosted"], {"model": model, "version": version})["yes"]
    return alerts.Finding(
        rule=alerts.GOLDEN,
        state=state(rescoring["difference"]),
        message=_in_short(rescoring),
        details={name: rescoring[name] for name in ("metric", "rows", "failed", "score", "reference", "difference")},
        cause="model" if hosted else "system",
        began_at=rescoring["at"],
    )


def _in_short(rescoring: Mapping[str, Any]) -> str:
    """What fell, by how much, without the intervals."""
    name, changed, before = f"{rescoring['model']}:{rescoring['version']}", rescoring["changed"], rescoring["reference"]
    score = f"{figures.words(rescoring['metric'])} is {figures.number(rescoring['score']['estimate'])}"
    if before:
        score += f", {figures.number(before['estimate'])} before"
    return (
        f"{name} was asked again the {rescoring['rows']} questions that it was judged by: {score}; "
        f"{changed['worse']} answers are worse, {changed['better']} better."
    )


def in_a_sentence(rescoring: Mapping[str, Any]) -> str:
    """How well a version did."""
    name, metric, rows = f"{rescoring['model']}:{rescoring['version']}", rescoring["metric"], rescoring["rows"]
    said = f"{name} answers {rows} golden rows with a {metric} of {in_words(rescoring['score'])}"
    if rescoring["failed"]:
        said += f" ({rescoring['failed']} without an answer)"
    if rescoring["difference"] is None:
        return f"{said}; there were no answers to hold them against, so later ones are held against these."
    changed = rescoring["changed"]
    said += (
        f", {in_words(rescoring['reference'])} before: a difference of {in_words(rescoring['difference'])} "
        f"({rescoring['difference']['level']:.0%} interval); {changed['worse']} are worse, {changed['better']} better."
    )
    return " ".join([said, *judge_in_words(rescoring)])


def judge_in_words(rescoring: Mapping[str, Any]) -> list[str]:
    """Sentences about the judge, if one scored. It scores the answers of then anew, so that another judge makes no
    difference between them; that it is another is told."""
    if (judge := rescoring["judge"]) is None or (then := judge["then"]) is None or rescoring["reference"] is None:
        return []
    if judge["version"] != then["version"]:
        return [f"The judge is {judge['served']}; it was {then['served']}, or was asked otherwise, then."]
    if (score := then["score"]) is None or score["low"] is None or score["high"] is None:
        return []
    if score["low"] <= (now := rescoring["reference"]["estimate"]) <= score["high"]:
        return []
    return [
        f"The judge has changed behind its name: of the answers that it gave {in_words(score)} when the "
        f"version was judged it now says {now:.3f}."
    ]
