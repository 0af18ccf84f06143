"""What goes with an alert on errors, latency or cost: what it comes of, what changed shortly before, which part grew,
and what to do.

Counted from windows: the version's, from shortly before the alert opened until it was over, beside those of all that
the model answered in the hours before; of an alert on cost, over the time that its limit is of, beside as long a time
before. How many requests come is counted of all versions, without copies. A part has grown when it is a quarter larger,
and what grew most is the cause:
more or longer requests (input), longer answers (model), else what requests go through (system). Errors are the
system's, unless the version that fails had just begun to serve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from infra.db import Connection
from monitoring import drift, explain, figures, statistics, windows
from monitoring.alerts import BUDGET, GOLDEN, NOT_SERVING, RECENT, REFUSED
from monitoring.attribution import Cause
from monitoring.windows import Window
from registry import deployments
from registry.deployments import Entry

BEFORE = timedelta(hours=6)
_SHORTLY = timedelta(hours=1)  # before an alert: a change within it is told
_GROWN = 1.25
_FEWEST = 20  # requests on either side


@dataclass(frozen=True, kw_only=True)
class Story:
    """`cause` is what it comes of, None where too little came to tell, and `began_at` since when; `sentences` say what
    is known, `advice` what to do; `changes` are the ledger's entries shortly before, the newest first, and `since` is
    from when on the alert's requests are."""

    cause: Cause | None
    began_at: datetime | None
    sentences: Sequence[str]
    advice: Sequence[str]
    changes: Sequence[Entry]
    since: datetime


def of(conn: Connection, alert: Mapping[str, Any], now: datetime) -> Story:
    """The story of a row of ``alert``."""
    model, version, opened = alert["model"], alert["version"], alert["opened_at"]
    entries = deployments.history(conn, model, opened)
    changes = [e for e in reversed(entries) if e.at > opened - _SHORTLY and e.slot != "shadow"]
    cause, began, since = alert["cause"], alert["began_at"], alert["began_at"] or opened - RECENT
    kept = (cause, began) if cause else None
    sentences: list[str] = []
    advice: list[str] = []
    if changes:
        newest = changes[0]
        minutes = max(1, round((opened - newest.at).total_seconds() / 60))
        sentences.append(f"{_minutes(minutes)} before it opened, {_done(newest)}, by {newest.actor}.")
        of_it = newest.slot == "champion" and newest.to_version == version and alert["rule"] not in (BUDGET, REFUSED)
        if of_it and newest.from_version is not None:
            advice.append(
                f"Did v{newest.from_version} do better? Going back is one command: `tunesmith rollback {model} "
                "--reason TEXT`."
            )
    if alert["rule"] == "drift" or version is None:
        if cause:
            moved = [f["name"] for f in alert["details"].get("features", ()) if not isinstance(f, str)]
            advice.append(explain.advice(model, cause, moved))
        advice.append("The drift page shows each thing that is measured, then and now.")
    elif alert["rule"] == NOT_SERVING:
        cause = "system"
        advice.append("A gateway's `/readyz`, asked with a key, and its log say why it does not follow.")
    elif alert["rule"] in (BUDGET, REFUSED):  # none of the four: somebody set a limit
        if alert["rule"] == REFUSED:
            sentences.append("They count for no version: they were refused before one was asked.")
            advice.append("`tunesmith limits` shows which limit of a key or the model is used up.")
            advice.append(
                "Where a gateway or an engine is full, more of either, or fewer requests at a time "
                f"(`tunesmith limit model:{model} --concurrent N`), help."
            )
        advice.append(
            f"Is it wanted? `tunesmith limit model:{model} --usd-per-day N` (or `--usd-per-month`) raises the budget, "
            "and the gateways follow within seconds."
        )
    elif alert["rule"] == GOLDEN:
        sentences.append("The questions are those that the version was judged by, so it is not what people ask.")
        advice += [
            "The drift page shows the rows that changed, as they were answered then and now.",
            f"`tunesmith rollback {model} --reason TEXT` brings back the version before, and then "
            f"`tunesmith rescore {model}` says whether that answers as well as it did. If it does not either, look at "
            "what both are served by: the engine's log, its packages, its machine, or the upstream.",
            f"Once it is mended, `tunesmith rescore {model}` ends this alert.",
        ]
    elif opened < now - timedelta(days=windows.MINUTE_DAYS) + BEFORE:
        sentences.append("What came by the minute is not kept from that long ago.")
    else:
        until, before = alert["closed_at"] or now, BEFORE
        grain: windows.Grain = "minute"
        if alert["rule"].startswith("cost"):  # which is the sum of a long time
            grain, before = "hour", timedelta(seconds=alert["details"].get("seconds", 86_400))
            since = opened - before
        else:
            series = partial(windows.series, conn, model, grain="minute", features=False)
            around = series(versions=[version], since=opened - _SHORTLY, until=min(until, opened + _SHORTLY))
            began = _began(around, alert["rule"])
            since = began or opened - RECENT
        series = partial(_asked, conn, model, grain)
        earlier, during = series(since - before, windows.floor(since, grain)), series(since, min(until, since + before))
        cause, told, todo = _of_traffic(
            model,
            alert["rule"],
            _of_points([point for point in during if point.version == version], during, grain),
            _of_points(earlier, earlier, grain),
            new=any(e.to_version == version and e.action != "rollback" for e in changes)
            and not any(point.version == version for point in earlier),
        )
        sentences += told
        advice += todo
    if kept is not None:  # as it was told
        cause, began = kept
    return Story(cause=cause, began_at=began, sentences=sentences, advice=advice, changes=changes, since=since)


def _done(entry: Entry) -> str:
    if entry.to_version is None:
        return f"v{entry.from_version} was taken out of its slot ({entry.slot})"
    version = f"v{entry.to_version}"
    if entry.action == "canary":
        return f"{version} got {figures.percent(entry.share)} of the traffic"
    return f"{version} was promoted" if entry.action == "promote" else f"{version} was brought back"


def cause_of(conn: Connection, alert: Mapping[str, Any], *, now: datetime) -> tuple[Cause | None, datetime | None]:
    """What an alert comes of, and since when, as far as can be told."""
    told = of(conn, {"closed_at": None, **alert, "cause": None, "began_at": None}, now)
    return told.cause, told.began_at


def _began(points: Sequence[windows.Point], rule: str) -> datetime | None:
    """From which minute on a rule's figure was another, None where that does not show."""
    if rule.startswith("error_rate"):
        columns = [[p.window.requests - p.window.errors, p.window.errors] for p in points]
        place = statistics.change_point(
            statistics.array(columns), partial(statistics.mean_difference, centres=(0.0, 1.0), worse="up")
        )
    else:
        times = [_coarse(p.window.ttft_ms if "ttft" in rule else p.window.latency_ms) for p in points]
        buckets = sorted({bucket for counts in times for bucket in counts})
        columns = [[counts[bucket] for bucket in buckets] for counts in times]
        place = statistics.change_point(statistics.array(columns), partial(statistics.ks, worse="up"))
    return None if place is None else points[place].start


def _coarse(counts: windows.Counts) -> Counter[int]:
    """Four buckets in one, which are as wide as a change that anybody would tell of."""
    found: Counter[int] = Counter()
    for bucket, n in counts.items():
        found[bucket // 4] += n
    return found


@dataclass(frozen=True)
class _Traffic:
    """What came, and how many requests a minute of all versions, of the minutes in which any did."""

    window: Window
    rate: float

    @property
    def asked(self) -> float:
        return self.window.prompt_tokens / self.window.answered

    @property
    def said(self) -> float:
        return self.window.completion_tokens / self.window.answered

    @property
    def token_ms(self) -> float:
        return 1000 * self.window.engine_seconds / max(1, self.window.completion_tokens)


def _asked(conn: Connection, model: str, grain: windows.Grain, since: datetime, until: datetime) -> list[windows.Point]:
    """Of all versions that answered anybody."""
    versions = drift.versions_with_traffic(conn, model, since, until)
    points = windows.series(conn, model, versions, since, until, grain, features=False)
    return [point for point in points if point.window.requests > point.window.slots.get("shadow", 0)]


def _of_points(points: Sequence[windows.Point], of_all: Sequence[windows.Point], grain: windows.Grain) -> _Traffic:
    minutes = len({p.start for p in of_all}) * (windows.GRAINS[grain] / timedelta(minutes=1))
    came = sum(p.window.requests - p.window.slots.get("shadow", 0) for p in of_all)
    return _Traffic(windows.total(p.window for p in points), came / max(1.0, minutes))


def _of_traffic(
    model: str, rule: str, during: _Traffic, before: _Traffic, *, new: bool
) -> tuple[Cause | None, list[str], list[str]]:
    """What it comes of, what grew, and what to do about it; `new` says that the version had just begun to serve."""
    cause: Cause | None = None
    told, todo = [], []
    if rule.startswith("error_rate"):
        cause = "model" if new else "system"
        errors = {status: n for status, n in sorted(during.window.status.items()) if status >= 500}
        if errors:
            told.append(
                f"Of {sum(errors.values())} failed requests "
                + ", ".join(f"{n} ended with {status}" for status, n in errors.items())
                + "."
            )
        todo.append("The requests that failed say what the engine or the upstream answered.")
        if 503 in errors or 502 in errors:
            todo.append("`tunesmith status` says whether the engines run; each has a log.")
    answered = during.window.answered, before.window.answered
    if min(answered) < _FEWEST:
        told.append(f"{answered[1]} answers before and {answered[0]} since are too few to say what else changed.")
        return cause, told, todo
    grown = [part for part in _parts(model) if _of(part, during) > _GROWN * _of(part, before) > 0]
    grown.sort(key=lambda part: _of(part, before) / _of(part, during))  # what grew most comes first
    for part in grown:
        now, then = _of(part, during), _of(part, before)
        told.append(f"{part.what.format(times=f'{now / then:.1f}')}: {now:.1f} {part.unit}, {then:.1f} before.")
        todo.append(part.advice)
    if grown and cause is None:
        cause = grown[0].cause
    if not grown and ("latency" in rule or "ttft" in rule):
        cause = "system"
        told.append(
            "Requests are no more and no longer than before, nor are answers, and the engine takes as long for a token."
        )
        todo.append("So it is what stands between: a queue, the network, or a few slow requests. Look at the slowest.")
    if rule.startswith("cost"):
        todo.append(
            f"If this is what it may cost, raise the limit in `monitoring.alerts`; `tunesmith limit model:{model} "
            "--usd-per-day N` ends it at an amount."
        )
    return cause, told, todo


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Something that a request's time and cost are made of: a property of `_Traffic`, and where it comes from."""

    name: str
    cause: Cause
    what: str
    unit: str
    advice: str


def _parts(model: str) -> list[_Part]:
    return [
        _Part(
            name="rate",
            cause="input",
            what="{times} times as many requests come",
            unit="a minute",
            advice=f"Are they wanted? `tunesmith limit model:{model} --requests-per-minute N` bounds them.",
        ),
        _Part(
            name="asked",
            cause="input",
            what="Questions are {times} times as long",
            unit="tokens",
            advice="Look at the longest requests: an application may have begun to send more with them.",
        ),
        _Part(
            name="said",
            cause="model",
            what="Answers are {times} times as long",
            unit="tokens",
            advice="Compare with the version before, which may say it shorter; `generation.max_tokens` bounds them.",
        ),
        _Part(
            name="token_ms",
            cause="system",
            what="The engine takes {times} times as long for a token",
            unit="ms",
            advice="Look at the machine: what else works on it, its memory, and the engine's log.",
        ),
    ]


def _of(part: _Part, traffic: _Traffic) -> float:
    return float(getattr(traffic, part.name))


def _minutes(minutes: int) -> str:
    return "1 minute" if minutes == 1 else f"{minutes} minutes"
