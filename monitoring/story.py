"""What goes with an alert on errors, latency or cost: what changed shortly before, which part grew, and what to do.

Counted from windows: the version's, from shortly before the alert opened until it was over, beside those of all that
the model answered in the hours before. A part has grown when it is a quarter larger; what is told is what was measured,
and that the alert comes of it is for a person to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from infra.db import Connection
from monitoring import drift, windows
from monitoring.alerts import NOT_SERVING, RECENT
from monitoring.windows import Window
from registry import deployments
from registry.deployments import Entry

BEFORE = timedelta(hours=6)
_SHORTLY = timedelta(hours=1)  # before an alert: a change within it is told
_GROWN = 1.25
_FEWEST = 20  # requests on either side


@dataclass(frozen=True, kw_only=True)
class Story:
    """`sentences` say what is known, `advice` what to do; `changes` are the ledger's entries shortly before, the newest
    first, and `since` is from when on the alert's requests are."""

    sentences: Sequence[str]
    advice: Sequence[str]
    changes: Sequence[Entry]
    since: datetime


def of(conn: Connection, alert: Mapping[str, Any], now: datetime) -> Story:
    """The story of a row of ``alert``."""
    model, version, opened = alert["model"], alert["version"], alert["opened_at"]
    until, since = alert["closed_at"] or now, opened - RECENT
    entries = deployments.history(conn, model, opened)
    changes = [e for e in reversed(entries) if e.at > opened - _SHORTLY and e.slot != "shadow"]
    sentences: list[str] = []
    advice: list[str] = []
    if changes:
        newest = changes[0]
        minutes = max(1, round((opened - newest.at).total_seconds() / 60))
        what = f"v{newest.to_version}" if newest.to_version else "none"
        sentences.append(
            f"{_minutes(minutes)} before it opened: {newest.action}, {newest.slot} now {what}, by {newest.actor}."
        )
        if newest.slot == "champion" and newest.to_version == version and newest.from_version is not None:
            advice.append(
                f"Did v{newest.from_version} do better? Going back is one command: `tunesmith rollback {model} "
                "--reason TEXT`."
            )
    if alert["rule"] == "drift" or version is None:
        advice.append("What moved, and what to do, stands in the message; the drift page shows it feature by feature.")
    elif alert["rule"] == NOT_SERVING:
        advice.append("A gateway's `/readyz`, asked with a key, and its log say why it does not follow.")
    elif until < now - timedelta(days=windows.MINUTE_DAYS):
        sentences.append("What came by the minute is not kept from that long ago.")
    else:
        others = drift.versions_with_traffic(conn, model, since - BEFORE, since)
        told, todo = _of_traffic(
            model,
            alert["rule"],
            _of_points(windows.series(conn, model, [version], since, min(until, since + BEFORE), "minute")),
            _of_points(windows.series(conn, model, others, since - BEFORE, windows.floor(since, "minute"), "minute")),
        )
        sentences += told
        advice += todo
    return Story(sentences=sentences, advice=advice, changes=changes, since=since)


@dataclass(frozen=True)
class _Traffic:
    """What came in `minutes`, those in which anything did."""

    window: Window
    minutes: int

    @property
    def rate(self) -> float:
        return self.window.requests / self.minutes

    @property
    def asked(self) -> float:
        return self.window.prompt_tokens / self.window.answered

    @property
    def said(self) -> float:
        return self.window.completion_tokens / self.window.answered

    @property
    def token_ms(self) -> float:
        return 1000 * self.window.engine_seconds / max(1, self.window.completion_tokens)


def _of_points(points: Sequence[windows.Point]) -> _Traffic:
    return _Traffic(windows.total(p.window for p in points), len({p.start for p in points}))


def _of_traffic(model: str, rule: str, during: _Traffic, before: _Traffic) -> tuple[list[str], list[str]]:
    """What grew, and what to do about it."""
    told, todo = [], []
    if rule.startswith("error_rate"):
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
        return told, todo
    grown = [part for part in _parts(model) if _of(part, during) > _GROWN * _of(part, before) > 0]
    for part in grown:
        now, then = _of(part, during), _of(part, before)
        told.append(f"{part.what.format(times=f'{now / then:.1f}')}: {now:.1f} {part.unit}, {then:.1f} before.")
        todo.append(part.advice)
    if not grown and ("latency" in rule or "ttft" in rule):
        told.append(
            "Requests are no more and no longer than before, nor are answers, and the engine takes as long for a token."
        )
        todo.append("So it is what stands between: a queue, the network, or a few slow requests. Look at the slowest.")
    if rule.startswith("cost"):
        todo.append(
            f"If this is what it may cost, raise the limit in `monitoring.alerts`; `tunesmith limit model:{model} "
            "--usd-per-day N` ends it at an amount."
        )
    return told, todo


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Something that a request's time and cost are made of: a property of `_Traffic`."""

    name: str
    what: str
    unit: str
    advice: str


def _parts(model: str) -> list[_Part]:
    return [
        _Part(
            name="rate",
            what="{times} times as many requests come",
            unit="a minute",
            advice=f"Are they wanted? `tunesmith limit model:{model} --requests-per-minute N` bounds them.",
        ),
        _Part(
            name="asked",
            what="Questions are {times} times as long",
            unit="tokens",
            advice="Look at the longest requests: an application may have begun to send more with them.",
        ),
        _Part(
            name="said",
            what="Answers are {times} times as long",
            unit="tokens",
            advice="Compare with the version before, which may say it shorter; `generation.max_tokens` bounds them.",
        ),
        _Part(
            name="token_ms",
            what="The engine takes {times} times as long for a token",
            unit="ms",
            advice="Look at the machine: what else works on it, its memory, and the engine's log.",
        ),
    ]


def _of(part: _Part, traffic: _Traffic) -> float:
    return float(getattr(traffic, part.name))


def _minutes(minutes: int) -> str:
    return "1 minute" if minutes == 1 else f"{minutes} minutes"
