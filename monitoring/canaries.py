"""Canaries in steps, stepped: what their traffic shows by the minute, and what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from deploy.rollout import Decision, Stream, decide
from infra.db import Connection, load_queries, one
from infra.errors import Refused
from monitoring import windows
from monitoring.windows import Counts, Window
from registry import deployments, rollouts
from registry.profile import FEATURE
from registry.rollouts import Rollout

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

_BEFORE = timedelta(hours=24)  # of the champion's traffic, that slow and long are told by
_LATE = timedelta(seconds=30)  # after a minute, for its events to arrive
_FEWEST = 50  # answers before the canary, without which nothing is called slow or long
_FLAGS = ("truncated", "empty")

Count = Callable[[Window], tuple[int, int]]  # how many were bad, and of how many
Minutes = Mapping[tuple[int, datetime], tuple[int, int]]  # the same, by version and minute


def step(conn: Connection, model: str, now: datetime) -> None:
    """Look at a model's canary, and do what follows. Nothing where none runs."""
    rollout = rollouts.running(conn, model)
    if rollout is None:
        return
    decision = look(conn, rollout, now)
    deployments.lock(conn, model)  # from here on nobody else changes it: what is done now meets no conflict
    if rollouts.lock(conn, model) != rollout:
        return
    there = deployments.read(conn, model)
    as_left = (there.champion, there.challenger, there.challenger_share)
    if as_left != (rollout.champion, rollout.version, rollout.share):
        rollouts.note(conn, rollout, "the deployment was changed by hand", rollout.findings)
        rollouts.end(conn, rollout, "promoted" if there.champion == rollout.version else "stopped")
        return
    said = decision.reason
    try:
        with conn.transaction():
            _act(conn, rollout, decision)
    except Refused as error:  # approvals are missing, say: it goes on as it is until they are there
        said = f"{said}, but {error.message}"
    rollouts.note(conn, rollout, said, [finding.to_json() for finding in decision.findings])
    if decision.action != "wait":
        log.info("canary of %s:%d: %s: %s", model, rollout.version, decision.action, said)


def _act(conn: Connection, rollout: Rollout, decision: Decision) -> None:
    if decision.action == "advance":
        rollouts.advance(conn, rollout, decision.reason)
    elif decision.action == "promote":
        rollouts.promote(conn, rollout, decision.reason)
    elif decision.action == "roll_back":
        rollouts.take_back(conn, rollout, decision.reason, "rolled_back")
    elif decision.action == "stop":
        rollouts.take_back(conn, rollout, decision.reason, "stopped")


def look(conn: Connection, rollout: Rollout, now: datetime) -> Decision:
    """What a canary should do at a time, by the two versions' traffic since it began: all of it, also what named a
    version. Changes nothing."""
    begun, until = windows.ceil(rollout.begun_at, "minute"), windows.floor(now - _LATE, "minute")
    both = (rollout.version, rollout.champion)
    points = windows.series(conn, rollout.model, both, rollout.begun_at, now, "minute")
    watched = _counted(
        windows.read(conn, rollout.model, rollout.champion, rollout.begun_at - _BEFORE, rollout.begun_at)
    )
    found: dict[str, Minutes] = {
        name: {(p.version, p.start): count(p.window) for p in points if begun <= p.start < until}
        for name, (count, _) in watched.items()
    }
    before = {name: earlier for name, (_, earlier) in watched.items()}
    span = {"model": rollout.model, "since": rollout.begun_at, "until": until, "versions": list(both)}
    found["disliked"] = {(r["version"], r["start"]): (r["bad"], r["n"]) for r in conn.execute(SQL["rated"], span)}
    earlier = {"since": rollout.begun_at - _BEFORE, "until": rollout.begun_at, "version": rollout.champion}
    row = one(conn, SQL["rated_before"], span | earlier)
    before["disliked"] = (row["bad"], row["n"])
    minutes = sorted({start for each in found.values() for _, start in each})
    streams = {name: _stream(rollout, minutes, counts, before[name]) for name, counts in found.items()}
    alerts = conn.execute(SQL["alerts"], span | {"version": rollout.version, "champion": rollout.champion})
    return decide(
        rollout.parsed,
        rollout.step,
        streams,
        requests=sum(
            p.window.requests
            for p in points
            if p.version == rollout.version and p.start >= windows.floor(rollout.step_at, "minute")
        ),
        in_step=max(timedelta(0), now - rollout.step_at),
        alerts=[f"{alert['rule']}: {alert['message']}" for alert in alerts],
    )


def _stream(rollout: Rollout, minutes: Sequence[datetime], counts: Minutes, before: tuple[int, int]) -> Stream:
    """Both sides' counts in the same minutes as everything else has."""
    ours = [counts.get((rollout.version, minute), (0, 0)) for minute in minutes]
    theirs = [counts.get((rollout.champion, minute), (0, 0)) for minute in minutes]
    return Stream(
        bad=[bad for bad, _ in ours], of=[of for _, of in ours],
        champion_bad=[bad for bad, _ in theirs], champion_of=[of for _, of in theirs], before=before,
    )  # fmt: skip


def _counted(before: Window) -> dict[str, tuple[Count, tuple[int, int]]]:
    """How each thing that is watched is counted in a window, and how often it was in the one before the canary."""
    counts: dict[str, Count] = {"errors": lambda w: (w.errors, w.requests)}
    for name in _FLAGS:
        counts[name] = _flagged(name)
    if before.answered >= _FEWEST:
        length = "completion_tokens"
        counts["slow"] = _above(lambda w: w.latency_ms, windows.quantile_bucket(before.latency_ms, 0.5))
        counts["slowest"] = _above(lambda w: w.latency_ms, windows.quantile_bucket(before.latency_ms, 0.95))
        counts["long"] = _above(
            lambda w: w.features.get(length, {}), windows.quantile_bucket(before.features.get(length, {}), 0.5)
        )
    return {name: (count, count(before)) for name, count in counts.items()}


def _above(histogram: Callable[[Window], Counts], limit: int | None) -> Count:
    def count(window: Window) -> tuple[int, int]:
        counts = histogram(window)
        return sum(n for index, n in counts.items() if limit is None or index > limit), sum(counts.values())

    return count


def _flagged(feature: str) -> Count:
    yes = FEATURE[feature].bin(1.0)

    def count(window: Window) -> tuple[int, int]:
        counts = window.features.get(feature, {})
        return counts.get(yes, 0), sum(counts.values())

    return count
