"""The watcher: closes windows, judges what serves, opens and closes alerts, steps canaries, asks for retrainings,
relays the outbox, keeps the partitions. One works at a time, under the lease `watch`; others wait to take over.

Each kind of work is a step with a period of its own and a transaction of its own, so one that fails (a database
restart, MLflow away) is tried again and holds up none of the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from deploy import budgets
from deploy.recorder import ensure_partitions
from infra import storage
from infra.db import Connection, load_queries, one, transaction
from infra.durations import parse_duration
from infra.errors import Conflict, TunesmithError, Unreachable
from infra.settings import get_settings
from monitoring import alerts, canaries, drift, feedback, golden, retraining, signals, story, windows
from registry import aliases, leases, notifications, rollouts

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

TURN = 1.0
LEASE_SECONDS = 30.0
JUDGE_EVERY = 3.0  # at most, while traffic comes
JUDGE_IDLE = 60.0  # at least, since old traffic leaves the window
JUDGE_WAITING = 10.0  # and when a retraining waits for what may have come, such as corrections
KEEP_VERDICT_EVERY = timedelta(minutes=10)
_MAX_BACK_OFF = 15.0


@dataclass(kw_only=True)
class _Step:
    """Work that recurs every `seconds`, later after failures: twice as long each time, up to _MAX_BACK_OFF more."""

    name: str
    seconds: float
    work: Callable[[], None]
    due: float = 0.0
    failures: int = 0
    waiting_for: str = field(default="")

    def run(self, now: float) -> None:
        if now < self.due:
            return
        try:
            self.work()
        except Conflict:
            raise
        except Exception as error:
            self.failures += 1
            self.due = now + self.seconds + min(_MAX_BACK_OFF, 0.5 * 2**self.failures)
            reason = str(error).strip().split("\n")[0]
            if reason != self.waiting_for:  # once, not at every try
                log.warning("%s failed, will try again: %s", self.name, reason, exc_info=not _expected(error))
            self.waiting_for = reason
            return
        if self.failures:
            log.info("%s works again", self.name)
        self.failures, self.waiting_for, self.due = 0, "", now + self.seconds


class Watcher:
    """Everything a watcher does, a turn at a time. Belongs to one thread."""

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.lease: leases.Lease | None = None
        self.exports = signals.wanted()
        self._touched: set[tuple[str, int]] = set()
        self._judged: dict[tuple[str, int], float] = {}
        self._failing: dict[str, str] = {}  # model or version -> why it cannot be judged
        self._behind: dict[str, tuple[int, datetime]] = {}  # model -> generation that a gateway has not, since when
        self._standing_by = False
        self._steps = (
            _Step(name="closing windows", seconds=0.0, work=self.close_windows),
            _Step(name="joining feedback", seconds=2.0, work=self.settle_feedback),
            _Step(name="judging", seconds=JUDGE_EVERY, work=self.judge),
            _Step(name="stepping canaries", seconds=15.0, work=self.step_canaries),
            _Step(name="looking at gateways", seconds=5.0, work=self.look_at_gateways),
            _Step(name="starting retrainings", seconds=5.0, work=self.start_retrainings),
            _Step(name="relaying to MLflow", seconds=1.0, work=self.relay),
            _Step(name="notifying", seconds=1.0, work=self.notify),
            _Step(name="keeping house", seconds=3600.0, work=self.keep_house),
        )
        self._renew_at = 0.0

    def turn(self) -> None:
        """Do what is due; nothing while another watcher holds the lease. Never raises for what passes."""
        try:
            if self._hold():
                for step in self._steps:
                    step.run(time.monotonic())
        except Conflict as error:
            log.warning("stopped watching: %s", error.message)
            self.lease = None

    def release(self) -> None:
        """Let another watcher take over at once."""
        if self.lease is not None:
            with transaction() as conn:
                leases.release(conn, self.lease)
            self.lease = None

    def _hold(self) -> bool:
        now = time.monotonic()
        if self.lease is not None and now < self._renew_at:
            return True
        try:
            with transaction() as conn:
                if self.lease is None:
                    self.lease = leases.acquire(conn, "watch", self.holder, LEASE_SECONDS)
                    log.info("watching as %s", self.holder)
                else:
                    self.lease = leases.renew(conn, self.lease)
        except Conflict as error:
            if self.lease is not None:
                raise
            if not self._standing_by:
                log.info("standing by: %s", error.message)
            self._standing_by = True
            return False
        self._standing_by = False
        self._renew_at = now + LEASE_SECONDS / 3
        return True

    def _check(self, conn: Connection) -> None:
        if self.lease is None:
            raise Conflict("This watcher holds no lease.")
        leases.check(conn, self.lease)

    # ------------------------------------------------------------ steps

    def close_windows(self) -> None:
        """All batches that wait, some at a time."""
        while True:
            with transaction() as conn:
                self._check(conn)
                closed = windows.close(conn, export=bool(self.exports))
            self._touched |= closed.versions
            if not closed.events:
                return

    def settle_feedback(self) -> None:
        """Feedback that came before its request did; and all of it, in windows."""
        with transaction() as conn:
            self._check(conn)
            feedback.settle(conn)
        with transaction() as conn:
            self._check(conn)
            windows.count_feedback(conn)

    def judge(self) -> None:
        """Verdicts, alerts and retraining requests for every version that holds a slot and had traffic, or that
        was not looked at for a while."""
        with transaction() as conn:
            now: datetime = one(conn, SQL["now"])["now"]
            served = conn.execute(SQL["served"]).fetchall()
        by_model: dict[str, list[Mapping[str, Any]]] = {}
        for version in served:
            by_model.setdefault(version["model"], []).append(version)
        for model, rows in by_model.items():
            for row in rows:
                key = (model, int(row["version"]))
                pause = JUDGE_WAITING if row["waits"] else JUDGE_IDLE
                if key in self._touched or time.monotonic() >= self._judged.get(key, 0.0) + pause:
                    self._touched.discard(key)
                    self._alone(f"{model}:{row['version']}", partial(_judge, row=row, now=now))
                    self._judged[key] = time.monotonic()
            serving, settings = [int(r["version"]) for r in rows], rows[0]["settings"]
            self._alone(model, partial(alerts.close_retired, model=model, versions=serving, settings=settings))
        self._touched &= {(version["model"], int(version["version"])) for version in served}

    def _alone(self, name: str, work: Callable[[Connection], None]) -> None:
        """Work for one version or model, in a transaction of its own: what is wrong with that one (a profile or
        settings that cannot be read) is told once, and holds up none of the others."""
        try:
            with transaction() as conn:
                self._check(conn)
                work(conn)
        except (Conflict, Unreachable):
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            if self._failing.get(name) != reason:
                log.warning("%s cannot be judged: %s", name, reason, exc_info=not _expected(error))
            self._failing[name] = reason
        else:
            self._failing.pop(name, None)

    def step_canaries(self) -> None:
        """Those that are to be stepped by what their traffic shows."""
        with transaction() as conn:
            now: datetime = one(conn, SQL["now"])["now"]
            models = rollouts.models(conn)
        for model in models:
            self._alone(f"the canary of {model}", partial(canaries.step, model=model, now=now))

    def look_at_gateways(self) -> None:
        """Do they serve what the deployments say?"""
        with transaction() as conn:
            self._check(conn)
            alerts.look_at_gateways(conn, self._behind, one(conn, SQL["now"])["now"])

    def start_retrainings(self) -> None:
        """Over HTTP, outside of any transaction; the requests' ids make it safe to repeat."""
        retraining.start_asked()

    def relay(self) -> None:
        """MLflow's aliases follow the deployment rows."""
        with transaction() as conn:
            self._check(conn)
            aliases.deliver(conn)

    def notify(self) -> None:
        """The webhook is told of changes, if there is one."""
        with transaction() as conn:
            self._check(conn)
            notifications.deliver(conn)

    def keep_house(self) -> None:
        """Partitions for the days to come; nothing that is older than the settings allow; aliases that a hand moved
        in MLflow's page set right; on this machine, no half-made artifacts of processes that died."""
        storage.sweep()
        days = get_settings().event_retention_days
        self._partitions(days)
        with transaction() as conn:
            self._check(conn)
            conn.execute(SQL["drop_default_events"], {"days": days})
            windows.drop_old(conn, days)
            feedback.settle(conn, late=True, limit=10_000)
            feedback.drop_old(conn, days)
            alerts.drop_old(conn, max(days, 90))
            drift.drop_old(conn, max(days, 90))
            golden.drop_old(conn, max(days, 90))
            aliases.drop_old(conn, days)
            notifications.drop_old(conn, days)
            budgets.drop_old(conn)
            aliases.reconcile(conn)

    def _partitions(self, days: int) -> None:
        """Days made and dropped, each in a transaction of its own. Dropping wants the table for itself, and behind one
        who waits for a long reader everybody waits: it gives up soon, to try again the next time."""
        with transaction() as conn:
            self._check(conn)
            ensure_partitions(conn)
            old = [row["name"] for row in conn.execute(SQL["old_partitions"], {"days": days})]
        for name in old:
            with transaction() as conn:
                try:
                    with conn.transaction():
                        conn.execute(SQL["soon"])
                        conn.execute(sql.SQL("drop table {}").format(sql.Identifier(name)))
                except (
                    psycopg.errors.LockNotAvailable
                ):  # caught here: `transaction` takes it for a database that is away
                    log.info("%s is still being read, and is dropped later", name)
                    return
            log.info("dropped %s, older than %d days", name, days)


def _judge(conn: Connection, row: Mapping[str, Any], now: datetime) -> None:
    """One version: its verdict, kept when it says something new, and what follows from it."""
    model, version, settings = row["model"], int(row["version"]), row["settings"]
    span = parse_duration(settings.get("monitoring", {}).get("window", "24h"))
    last = drift.last(conn, model, version)
    lately = last is not None and now - last["at"] < KEEP_VERDICT_EVERY
    body = drift.judge(conn, model, version, now - span, now, before=last["body"] if last and lately else None)
    if last is None or last["verdict"] != body["verdict"] or not lately:
        identifier = drift.keep(conn, body)
    else:
        identifier = last["id"]
    found = [alerts.of_verdict(body), golden.look(conn, model, version)]
    found += alerts.look(conn, model, version, settings, now, span)
    if row["slot"] == "shadow":  # it answers nobody
        found = [replace(finding, severity="info") for finding in found]
    if row["slot"] == "champion":
        found += alerts.look_at_refusals(conn, model, version, now)
    alerts.apply(conn, model, version, found, explain=partial(story.cause_of, now=now))
    if row["slot"] == "champion" and body["verdict"] == "drift":
        retraining.consider(conn, model, version, identifier, settings, body)


def _expected(error: Exception) -> bool:
    return isinstance(error, TunesmithError)


def run(stop: threading.Event) -> None:
    """Watch until `stop` is set. Outlives restarts of the database and of everything else it talks to."""
    watcher = Watcher(leases.this_process("watch"))
    exporter = None
    failures = 0
    if watcher.exports:
        from monitoring.otlp import Exporter

        exporter = Exporter(lambda: watcher.lease, watcher.exports)
        exporter.start()
    try:
        while not stop.wait(TURN if not failures else min(_MAX_BACK_OFF, 0.5 * 2**failures)):
            try:
                watcher.turn()
                failures = 0
            except Exception as error:
                failures += 1
                level = logging.WARNING if failures == 1 else logging.DEBUG
                log.log(level, "the watcher waits: %s", error, exc_info=not _expected(error))
    finally:
        if exporter is not None:
            exporter.close()
        try:
            watcher.release()
        except TunesmithError as error:
            log.info("the lease was not released: %s", error.message)
