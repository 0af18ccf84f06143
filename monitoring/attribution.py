"""What a drift verdict comes of: what is asked (`input`), what the version answers (`model`), or those who score
(`judge`); and since when, with examples. Of alerts on latency, errors and cost monitoring/story.py says it.

By elimination, in the order in which one moves the next. Other requests bring other answers and other scores, so where
the requests moved, it is they. Other answers to the same requests are the version's. Scores that fell while requests
and answers are as they were are the version's where it was liked less from its beginning than what served before it,
and those of who scores where this very version used to be liked better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.db import Connection, load_queries, one
from monitoring import statistics, windows
from registry.profile import FEATURE, FEATURES, Feature

if TYPE_CHECKING:
    from monitoring.drift import Moved

SQL = load_queries(Path(__file__).with_suffix(".sql"))

Cause = Literal["input", "model", "judge", "system"]

# A time that is looked at by the minute; one that is by the hour, then around the change; a longer one by the day
_SHORT, _MIDDLE = timedelta(hours=3), timedelta(days=14)
_FEW_HOURS = 6  # with traffic, that are looked at by the minute too
_SAID = 10_000  # pieces of feedback, at most
_COLUMNS = 160  # that any time is looked at in, at most
_EXAMPLES = 5
_AMONG, _ANSWERED = 20_000, 2_000  # requests that examples are looked for in
_UNSEEN = 0.5  # requests that are added to an empty bin of the reference


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """`features` are those that tell of the cause, the furthest first; `since` is when it began, None where it was so
    all through the time that was looked at; `requests` are ids of examples, the plainest first."""

    cause: Cause
    features: Sequence[str]
    since: datetime | None
    requests: Sequence[str]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attribution:
        since = datetime.fromisoformat(value["since"]) if value["since"] else None
        return cls(cause=value["cause"], features=value["features"], since=since, requests=value["requests"])

    def to_json(self) -> dict[str, Any]:
        return {
            "cause": self.cause,
            "features": list(self.features),
            "since": self.since and self.since.isoformat().replace("+00:00", "Z"),
            "requests": list(self.requests),
        }


def cause_of(moved: Iterable[Moved], *, was_liked: bool) -> Cause:
    """Of the features that moved, at least one; `was_liked` says that the same version's earlier scores were better."""
    sides = {m.feature.side for m in moved}
    if "input" in sides:
        return "input"
    only_scores = {m.feature.name for m in moved} == {"score"}
    return "judge" if only_scores and was_liked else "model"


def earlier_scores(conn: Connection, model: str, version: int, since: datetime) -> list[int]:
    """The histogram of the scores that people gave a version's answers before a time."""
    score = FEATURE["score"]
    row = one(
        conn,
        SQL["earlier_scores"],
        {"model": model, "version": version, "since": since, "edges": list(score.edges), "most": _SAID},
    )
    return statistics.dense(row["score"], score.bins)


def explain(
    conn: Connection, model: str, version: int, moved: Sequence[Moved], cause: Cause, since: datetime, until: datetime
) -> Attribution:
    """The attribution of a version's drift between two times, whose cause is known."""
    of_cause = [m for m in moved if cause != "input" or m.feature.side == "input"]
    telling = sorted(of_cause, key=lambda m: -m.value / m.threshold)
    worst = telling[0]
    if worst.feature.side == "quality":
        began = _began(
            _columns_said(conn, model, version, worst.feature, since, until, as_given=cause == "judge"), worst
        )
    else:
        began = _began_in_windows(conn, model, version, worst, since, until)
    began = max(began, since) if began else None  # the first hour may have begun before
    return Attribution(
        cause=cause,
        features=[m.feature.name for m in telling],
        since=began,
        requests=_examples(conn, model, version, telling, began=began or since, since=since, until=until),
    )


# ---------------------------------------------------------------- since when

_Columns = Sequence[tuple[datetime, Sequence[int]]]  # the histogram of a feature from each time on


def _began_in_windows(
    conn: Connection, model: str, version: int, worst: Moved, since: datetime, until: datetime
) -> datetime | None:
    def columns(begin: datetime, end: datetime, grain: windows.Grain) -> list[tuple[datetime, list[int]]]:
        points = windows.series(conn, model, [version], begin, end, grain)
        return [(p.start, p.window.histogram(worst.feature.name)) for p in points]

    by_minute = since > datetime.now(UTC) - timedelta(days=windows.MINUTE_DAYS)
    if by_minute and until - since <= _SHORT:
        return _began(columns(since, until, "minute"), worst)
    if until - since > _MIDDLE:
        return _began(columns(since, until, "day"), worst)
    hours = columns(since, until, "hour")
    if by_minute and len(hours) < _FEW_HOURS:
        return _began(columns(since, until, "minute"), worst)
    if (hour := _began(hours, worst)) is None or not by_minute:
        return hour
    low, high = max(since, hour - timedelta(hours=1)), min(until, hour + timedelta(hours=1))
    before = [c for c in hours if c[0] < windows.floor(low, "hour")]
    after = [c for c in hours if c[0] >= high]
    return _began([*before, *columns(windows.floor(low, "hour"), high, "minute"), *after], worst) or hour


def _columns_said(
    conn: Connection, model: str, version: int, feature: Feature, since: datetime, until: datetime, *, as_given: bool
) -> _Columns:
    """What people said, in equal parts, by time."""
    span = {"model": model, "version": version, "since": since, "until": until}
    rows = conn.execute(SQL["said"], {**span, "as_given": as_given, "most": _SAID}).fetchall()
    said = sorted((row["at"], row[feature.name]) for row in rows if row[feature.name] is not None)
    size = max(1, -(-len(said) // _COLUMNS))
    columns = []
    for start in range(0, len(said), size):
        counts = [0] * feature.bins
        for _, value in said[start : start + size]:
            counts[feature.bin(value)] += 1
        columns.append((said[start][0], counts))
    return columns


def _began(columns: _Columns, worst: Moved) -> datetime | None:
    """From when on a feature is further from its reference than before; where it came back meanwhile, when it left."""
    used = [i for i in range(worst.feature.bins) if worst.before[i] or any(counts[i] for _, counts in columns)]
    merged = [columns[n : n + _per_column(columns)] for n in range(0, len(columns), _per_column(columns))]
    counts = statistics.array([[sum(c[i] for _, c in part) for i in used] for part in merged])
    _, distance = statistics.of(worst.feature, used)
    reference, place = statistics.array([worst.before[i] for i in used]), len(counts)
    while (place := statistics.change_point(counts[:place], distance) or 0) > 0:
        before, after = (float(distance(reference, side.sum(0))) for side in (counts[:place], counts[place:]))
        if after > before:
            return merged[place][0][0]
    return None


def _per_column(columns: _Columns) -> int:
    return -(-len(columns) // _COLUMNS)


# ---------------------------------------------------------------- examples


def _examples(
    conn: Connection, model: str, version: int, telling: Sequence[Moved], *, began: datetime, since: datetime,
    until: datetime,
) -> list[str]:  # fmt: skip
    """Requests since the change that look most like what is new: by how much commoner their bins are now than before,
    over all features that moved (the log of the likelihood ratio, features taken as independent)."""
    span = {"model": model, "version": version, "began": began, "since": since, "until": until}
    measured = [(FEATURES.index(m.feature), m.feature, _log_ratios(m)) for m in telling if m.feature.side != "quality"]
    if not measured:
        return [str(row["id"]) for row in conn.execute(SQL["disliked"], {**span, "most": _EXAMPLES})]

    def newness(features: Sequence[float]) -> float:
        return sum(
            ratios[feature.bin(features[place])]
            for place, feature, ratios in measured
            if place < len(features) and features[place] == features[place]  # not NaN
        )

    rows = conn.execute(SQL["answered"], {**span, "among": _AMONG, "most": _ANSWERED})
    found = sorted(((newness(row["features"]), str(row["id"])) for row in rows), reverse=True)
    return [identifier for new, identifier in found[:_EXAMPLES] if new > 0]


def _log_ratios(m: Moved) -> list[float]:
    n, known = sum(m.now), sum(m.before)
    return [
        math.log((now + _UNSEEN) / (n + _UNSEEN)) - math.log((before + _UNSEEN) / (known + _UNSEEN))
        for before, now in zip(m.before, m.now, strict=True)
    ]


LABELS: Mapping[Cause, str] = {
    "input": "what is asked",
    "model": "the version's answers",
    "judge": "those who score",
    "system": "what requests go through: the engine, its machine, the network",
}
