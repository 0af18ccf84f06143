"""Has the traffic of a version moved away from what the version knows: in words, over time, and bin by bin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup
from starlette.responses import Response

from infra.db import Connection, one, transaction
from infra.durations import parse_duration
from infra.errors import NotFound
from monitoring import drift, explain, figures, golden, windows
from monitoring.console import charts, examples, strips
from monitoring.console.model import look
from monitoring.console.render import RANGES, SQL, Visit, draw, whole
from monitoring.console.svg import Write
from registry import deployments
from registry.names import check_model_name
from registry.profile import FEATURE, FEATURES, Feature, Profile
from registry.statistics import in_words

_COLUMNS = 24  # of the heat map
_BINS = 24  # of a drawn distribution, at most
_RESCORINGS = 10
_MOMENT = timedelta(minutes=15)


def show(visit: Visit) -> Response:
    """The verdict of one version (the champion, if none is named) and all its features."""
    name, until = check_model_name(visit.path("model")), datetime.now(UTC)
    with transaction() as conn:
        now = deployments.read(conn, name)
        since, begin = _range(conn, visit, name, until)
        numbers = [row["number"] for row in conn.execute(SQL["numbers"], {"model": name})]
        number = whole(visit.query("version"), "version") if visit.query("version") else _first(now.champion, numbers)
        if number is None:
            return draw(visit, "drift.html", model=name, number=None, since=since, versions=[], now=now)
        if number not in numbers:
            raise NotFound(f"There is no version {name}:{number}.", hint=f"See `tunesmith versions {name}`.")
        asked = {"model": name, "version": number, "since": begin, "until": until, "columns": _COLUMNS}
        last = conn.execute(SQL["last_compared"], asked).fetchone()
        looked = drift.look(conn, name, number, begin, until)
        report = drift.judge(conn, name, number, begin, until, before=_of_now(last, begin, until), looked=looked)
        heat = {
            (row["name"] or FEATURES[row["feature"] - 1].name, row["place"]): row["ratio"]
            for row in conn.execute(SQL["heat"], asked)
        }
        judged = one(conn, SQL["judged"], asked)["n"]
        latest = {row["version"]: row for row in conn.execute(SQL["last_verdicts"], {"model": name})}
        retrains = conn.execute(SQL["retrains"], {"model": name}).fetchall()
        found = report["attribution"]
        rescorings = golden.newest(conn, name, number, _RESCORINGS)
        shown = examples.read(conn, visit, name, number, found["requests"]) if found else []
    moved = [f["name"] for f in report["features"] if f["drifted"]]
    todo = explain.advice(name, found["cause"], moved) if found else ""
    features, features_at = report["features"], None
    if not features and last is not None:  # too few requests to compare now: what they last showed
        features, features_at = last["body"]["features"], last["at"]
    features = sorted(features, key=lambda f: -_ratio(f))
    wanted = visit.query("feature") or (features[0]["name"] if features else "")
    return draw(
        visit,
        "drift.html",
        model=name,
        number=number,
        since=since,
        now=now,
        versions=[{"number": n, "slot": now.slot_of(n), "look": look(n), "verdict": latest.get(n)} for n in numbers],
        report=report,
        said=report["explanation"].removesuffix(todo),
        todo=todo,
        requests=looked.window.requests,
        features=[_row(f, heat, begin, until) for f in features],
        features_at=features_at,
        begin=begin,
        until=until,
        judged=judged,
        wanted=wanted,
        distribution=_distribution(wanted, looked, number),
        measures=next((f["also"] for f in features if f["name"] == wanted and "also" in f), {}),
        new_words=_new_words(looked.window),
        retrains=[r for r in retrains if r["version"] == number],
        examples=shown,
        in_words=in_words,
        rescorings=[
            {**r, "state": golden.state(r["difference"]), "about_judge": golden.judge_in_words(r)} for r in rescorings
        ],
    )


def _range(conn: Connection, visit: Visit, model: str, until: datetime) -> tuple[str, datetime]:
    """The range that was asked for, or else what the watcher judges by, and where it begins."""
    if (asked := visit.query("since")) in RANGES:
        return asked, until - RANGES[asked]
    span = one(conn, SQL["judged_over"], {"model": model})["span"] or "24h"
    return span, until - parse_duration(span)


def _new_words(window: windows.Window) -> list[tuple[str, int]]:
    """Commonest first; what fewer than three requests had could name a person, and says nothing of a trend."""
    counts = [(word, n) for word, n in window.new_words.counts.items() if n >= 3]
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))[:24]


def _first(champion: int | None, numbers: Sequence[int]) -> int | None:
    return champion if champion is not None else next(iter(numbers), None)


def _ratio(f: Mapping[str, Any]) -> float:
    """To sort by: what was not compared comes last."""
    found = drift.ratio(f)
    return -1.0 if found is None else found


def _of_now(last: Mapping[str, Any] | None, begin: datetime, until: datetime) -> Mapping[str, Any] | None:
    """A verdict on the very span that is looked at, of a moment ago: what it comes of need not be found again."""
    if last is None or until - last["at"] > _MOMENT:
        return None
    return last["body"] if abs((last["until"] - last["since"]) - (until - begin)) < _MOMENT else None


def _row(
    f: Mapping[str, Any], heat: Mapping[tuple[str, int], float], begin: datetime, until: datetime
) -> dict[str, Any]:
    """A feature with its heat: the worst verdict within each of the range's columns."""
    length = (until - begin) / _COLUMNS
    worst = [heat.get((f["name"], column)) for column in range(_COLUMNS)]
    name = label(f["name"])
    cells = [
        (ratio, f"{name}\njudged {_times(begin + i * length, length)}\n{_says(ratio)}") for i, ratio in enumerate(worst)
    ]
    return {**f, "label": name, "heat": strips.heat(cells, title=f"{name} over time")}


def label(name: str) -> str:
    """A feature's name as words."""
    text = FEATURE[name].label if name in FEATURE else name.replace("_", " ")
    return text[:1].upper() + text[1:]


def _times(at: datetime, length: timedelta) -> str:
    return f"{at:%b} {at.day}, {at:%H:%M} – {at + length:%H:%M} UTC"


def _says(ratio: float | None) -> str:
    return "not judged" if ratio is None else f"{figures.number(ratio, 2)} × the threshold"


def _distribution(name: str, looked: drift.Looked, number: int) -> Markup | None:
    """The chart of one feature, live against reference, on bins joined until a person can read them."""
    feature = FEATURE.get(name)
    if feature is None or name not in looked.reference.histograms:
        return None
    old, new = looked.reference.histograms[name], looked.quality.get(name) or looked.window.histogram(name)
    groups = _groups(feature, [a + b for a, b in zip(old, new, strict=True)])
    return charts.histogram(
        key="distribution",
        title=label(name),
        labels=[_bin_label(feature, first, last, looked.reference) for first, last in groups],
        reference=_shares(old, groups),
        live=_shares(new, groups),
        write=figures.percent,
        reference_name=f"what v{number} knows ({figures.number(sum(old))})",
        live_name=f"live ({figures.number(sum(new))})",
    )


def _groups(feature: Feature, counts: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring bins (first, last), from the first used bin to the last one."""
    if feature.kind in ("flag", "category"):
        return [(i, i) for i in range(feature.bins) if counts[i] or not feature.names]
    used = [i for i, n in enumerate(counts) if n] or [0]
    size = math.ceil((used[-1] - used[0] + 1) / _BINS)
    return [(i, min(i + size - 1, used[-1])) for i in range(used[0], used[-1] + 1, size)]


def _shares(counts: Sequence[int], groups: Iterable[tuple[int, int]]) -> list[float]:
    total = sum(counts) or 1
    return [sum(counts[first : last + 1]) / total for first, last in groups]


def _bin_label(feature: Feature, first: int, last: int, reference: Profile) -> str:
    if feature.kind == "flag":
        return "no" if first == 0 else "yes"
    if feature.kind == "category":
        return reference.group(feature, first)
    write: Write = figures.percent if feature.kind == "share" else figures.number
    if first == 0 and feature.kind == "share" and last == 0:
        return "none"
    low = feature.edges[first - 1] if first else None
    high = feature.edges[last] if last < len(feature.edges) else None
    if low is None:
        return f"< {write(high)}"
    if high is None:
        return f"≥ {write(low)}"
    return f"{write(low).removesuffix(' %')}{' to ' if low < 0 else '–'}{write(high)}"
