"""Canaries in steps, stepped: what their traffic shows by the minute, and what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from deploy.rollout import Decision, Stream, decide
from infra.db import Connection, load_queries, one
from infra.errors import Conflict, Refused, TunesmithError, Unreachable
from monitoring import windows
from monitoring.windows import Counts, Window
from registry import approvals, deployments, rollouts
from registry.deployments import Deployment
from registry.profile import FEATURE
from registry.rollouts import Rollout

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

_BEFORE = timedelta(hours=24)  # of the champion's traffic, that slow, long and dear are told by
_LATE = timedelta(seconds=30)  # after a minute, for its events to arrive
_FEWEST = 50  # answers before the canary, without which nothing is called slow, long or dear
_FLAGS = ("truncated", "empty")
_LEFT = 499  # the status of a request whose client closed the connection

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
    if (there.champion, there.challenger, there.challenger_share) != (
        rollout.champion, rollout.version, rollout.share,
    ):  # fmt: skip
        _by_hand(conn, rollout, there)
        return
    try:
        deployments.check_passed(conn, model, rollout.version, compared=True)
    except Refused as error:  # it was judged again meanwhile, and could not be promoted in the end
        decision = replace(decision, action="take_back", reason=error.message.rstrip("."))
    said = decision.reason
    try:
        with conn.transaction():
            _act(conn, rollout, decision)
    except (Conflict, Unreachable):
        raise
    except TunesmithError as error:  # approvals are missing, say: it goes on as it is until they are there
        said = f"{said}, but {error.message}"
    rollouts.note(conn, rollout, said, [finding.to_json() for finding in decision.findings])
    if decision.action != "wait" and said != rollout.said:
        log.info("canary of %s:%d: %s: %s", model, rollout.version, decision.action, said)


def _by_hand(conn: Connection, rollout: Rollout, there: Deployment) -> None:
    """Somebody changed the deployment: they have the last word. A challenger whose champion is gone is taken off, since
    nobody watches it any more."""
    said = "the deployment was changed by hand"
    rollouts.note(conn, rollout, said, rollout.findings)
    if (there.challenger, there.challenger_share) == (rollout.version, rollout.share):
        rollouts.take_back(conn, rollout, f"{said}: version {there.champion} serves", "stopped")
    else:
        rollouts.end(conn, rollout, "promoted" if there.champion == rollout.version else "stopped")


def _act(conn: Connection, rollout: Rollout, decision: Decision) -> None:
    if decision.action == "advance":
        agreed = approvals.of(conn, rollout.model, rollout.version)
        if agreed.missing:  # the first step is how one finds out; more is serving
            raise Refused(f"{rollout.model}:{rollout.version} gets no more traffic: {agreed.outstanding()}.")
        rollouts.advance(conn, rollout, decision.reason)
    elif decision.action == "promote":
        rollouts.promote(conn, rollout, decision.reason)
    elif decision.action == "take_back":
        rollouts.take_back(conn, rollout, decision.reason, "taken_back")
    elif decision.action == "stop":
        rollouts.take_back(conn, rollout, decision.reason, "stopped")


def look(conn: Connection, rollout: Rollout, now: datetime) -> Decision:
    """What a canary should do at a time, by the two versions' traffic since it began: of that what was drawn, since the
    test is of two samples of one traffic. Changes nothing."""
    begun, until = windows.ceil(rollout.begun_at, "minute"), windows.floor(now - _LATE, "minute")
    both = (rollout.version, rollout.champion)
    points = windows.series(conn, rollout.model, both, rollout.begun_at, now, "minute")
    watched = _counted(
        windows.read(conn, rollout.model, rollout.champion, rollout.begun_at - _BEFORE, rollout.begun_at)
    )
    found: dict[str, Minutes] = {
        name: {(p.version, p.start): _drawn(count, p.window) for p in points if begun <= p.start < until}
        for name, (count, _) in watched.items()
    }
    before = {name: seen for name, (_, seen) in watched.items()}
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
            p.window.slots.get("challenger", 0)  # not what named it, nor copies
            for p in points
            # Of the minutes that were looked at: a step is not passed by what nobody has seen yet
            if p.version == rollout.version and max(begun, windows.floor(rollout.step_at, "minute")) <= p.start < until
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
    # Of a version that hangs, what was answered looks well
    counts["abandoned"] = lambda w: (w.status.get(_LEFT, 0), w.requests)
    for name in _FLAGS:
        counts[name] = _from(_of(name), FEATURE[name].bin(1.0))
    if before.answered >= _FEWEST:
        length = _of("answer_characters")  # tokens of a hosted model are of another kind
        for name, histogram, quantile in (
            ("late", lambda w: w.ttft_ms, 0.5), ("slow", lambda w: w.latency_ms, 0.5),
            ("slowest", lambda w: w.latency_ms, 0.95), ("long", length, 0.5), ("dear", lambda w: w.cost_micro_usd, 0.5),
        ):  # fmt: skip
            if (usual := windows.quantile_bucket(histogram(before), quantile)) is not None:
                counts[name] = _from(histogram, usual + 1)
    return {name: (count, _drawn(count, before)) for name, count in counts.items()}


def _drawn(count: Count, window: Window) -> tuple[int, int]:
    """The count without what nobody drew."""
    bad, of = count(window)
    others_bad, others = count(window.chosen) if window.chosen is not None else (0, 0)
    return bad - others_bad, of - others


def _from(histogram: Callable[[Window], Counts], least: int) -> Count:
    """How many lie in this bin or beyond."""

    def count(window: Window) -> tuple[int, int]:
        counts = histogram(window)
        return sum(n for index, n in counts.items() if index >= least), sum(counts.values())

    return count


def _of(feature: str) -> Callable[[Window], Counts]:
    return lambda window: window.features.get(feature, {})
