"""`tunesmith up`: starts the local processes in order, restarts what dies, and leaves none behind.

One thread: it starts every child (the kernel ties a child's life to the thread that started it), looks at each
twice a second, and asks the database once a second which engines are wanted.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import psycopg

from infra import guard, migrate, ports, postgres, processes, reconcile, services, state
from infra.db import load_queries
from infra.errors import TunesmithError
from infra.services import Service
from infra.settings import Settings
from infra.state import ServiceState, StackState, State

SQL = load_queries(Path(__file__).with_suffix(".sql"))
READY_WITHIN = 300.0  # seconds; a loaded machine is slow, a broken one says so by dying
DEATHS_BEFORE_READY = 3
LOG_BYTES = 10_000_000
LOGS_KEPT = 3
UNWANTED_ENGINE_SECONDS = 60.0

Report = Callable[[dict[str, Any]], None]


class Stop(Exception):
    """A signal asked the supervisor to end."""


@dataclass(kw_only=True)
class Unit:
    """One supervised process and its history."""

    service: Service
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    created: float | None = None  # by the kernel's account
    began: float = 0.0  # monotonic
    deaths: int = 0
    was_ready: bool = False
    next_start: float = 0.0
    unwanted_since: float | None = None

    def shown(self) -> ServiceState:
        return ServiceState(
            name=self.service.name,
            state=self.state,
            url=self.service.url,
            health=self.service.health,
            pid=self.process.pid if self.process else None,
            started=self.created,
        )


@dataclass(kw_only=True)
class Supervisor:
    """The stack of one home, from the lock to the last process's end.

    `own` are the settings as a person made them, without those of a stack that ran before. `report` gets what
    there is to show: ``{"kind": "service"|"note"|"key"|"ready", ...}``; it must not raise.
    """

    own: Settings
    report: Report
    mark: str = field(default_factory=lambda: os.urandom(16).hex())
    units: dict[str, Unit] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    settings: Settings = field(init=False)  # of the stack, complete once ports are chosen
    ready: bool = False
    began: float = 0.0
    stopping: int = 0
    asked_by: int = 0
    connection: psycopg.Connection[Any] | None = None
    guard: subprocess.Popen[bytes] | None = None
    last_turn: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = self.own

    @property
    def home(self) -> Path:
        return self.own.home

    def run(self) -> int:
        """Start, supervise until a signal says stop, end everything; returns that signal's number.

        The caller holds the home's lock. Raises TunesmithError when the stack does not come up.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        before = state.read(self.home)
        if before is not None:
            self.ports = dict(before.ports)
            guard.sweep(self.home, before.mark)
        (self.home / "logs").mkdir(exist_ok=True)
        self.guard = guard.start(self.home, self.mark)
        try:
            self.start()
            while True:
                self.turn()
                self.rest(0.5 if self.ready else 0.1)
        except Stop:
            return self.asked_by
        finally:
            self.stop()

    def start(self) -> None:
        """Everything up to the first turn of the loop: PostgreSQL, schema, first key."""
        cluster = postgres.prepare(self.home) if self.own.database_url is None else None
        self.ports, notes = services.choose_ports(self.own, self.ports)
        self.settings = services.resolve(self.own, self.ports, cluster)
        for note in notes:
            self.report({"kind": "note", "text": note})
        for service in services.fixed(self.settings, self.ports, cluster, self.mark):
            self.units[service.name] = Unit(service=service)
        self.began = time.monotonic()
        self.save()
        while "postgres" in self.units and self.units["postgres"].state != "ready":
            self.look(self.units["postgres"])
            self.rest(0.05)
        migrate.create_databases(self.settings)
        migrate.migrate(self.settings.database())
        self.first_key()

    def first_key(self) -> None:
        """Make the first admin key where there is none, and show it this once."""
        with psycopg.connect(self.settings.database()) as conn:
            row = conn.execute(SQL["has_keys"]).fetchone()
        if row is not None and row[0]:
            return
        done = subprocess.run(
            [*services.TUNESMITH, "keys", "create", "--role", "admin", "--name", "first", "--json"],
            env=services.environment(self.settings, self.mark),
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=120,
        )
        try:
            made = json.loads(done.stdout)
            self.report({"kind": "key", "id": made["id"], "key": made["key"]})
        except (ValueError, KeyError) as error:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise TunesmithError(f"The first admin key could not be made: {last}") from error

    def turn(self) -> None:
        """Look at every process once; every second at the wanted engines, every half minute at logs and runs."""
        for unit in list(self.units.values()):
            self.look(unit)
        if not self.ready:
            self.check_start()
        if self.every("engines", 1.0):
            self.engines()
        if self.every("house", 30.0):
            for path in (self.home / "logs").glob("*.log"):
                rotate(path)
            self.clear_dead_runs(own_pool=False)
        if self.guard is not None and self.guard.poll() is not None:
            self.guard = guard.start(self.home, self.mark)

    def look(self, unit: Unit) -> None:
        """Move one unit on: start it, see it ready, see it dead."""
        now = time.monotonic()
        if unit.process is None:
            needs = (self.units.get(name) for name in unit.service.needs)
            if now >= unit.next_start and all(need is None or need.was_ready for need in needs):
                self.launch(unit)
            return
        code = unit.process.poll()
        if code is not None:
            processes.signal_group(unit.process.pid, signal.SIGKILL)  # what it left in its group
            unit.deaths = 1 if unit.state == "ready" and now - unit.began > 60 else unit.deaths + 1
            unit.process, unit.created = None, None
            unit.next_start = now + min(30.0, 0.5 * 2 ** (unit.deaths - 1))
            if unit.deaths >= DEATHS_BEFORE_READY and not self.ready and not unit.service.name.startswith("engine-"):
                raise TunesmithError(
                    f"{unit.service.name} does not start: {self.last_line(unit)}",
                    hint=f"Its log: {self.log_of(unit.service.name)}",
                )
            self.set(unit, "restarting", f"ended with code {code}: {self.last_line(unit)}")
        elif unit.state == "starting" and now - unit.began >= unit.service.settle and unit.service.ready():
            unit.was_ready = True
            self.set(unit, "ready", f"after {now - unit.began:.1f} s")

    def launch(self, unit: Unit) -> None:
        if unit.service.name == "runner" and not unit.deaths:
            # Nothing of ours can be running a flow now, unless the Prefect server is the team's, with more runners.
            self.clear_dead_runs(own_pool=self.own.prefect_url is None)
        with self.log_of(unit.service.name).open("ab") as log:  # for appending, so that `rotate` may cut it
            unit.process = unit.service.start(log)
        unit.began = time.monotonic()
        try:
            unit.created = psutil.Process(unit.process.pid).create_time()
        except psutil.Error:
            unit.created = None
        self.set(unit, "starting")

    def check_start(self) -> None:
        if all(unit.state == "ready" for unit in self.units.values() if not unit.service.name.startswith("engine-")):
            self.ready = True
            self.save()
            self.report({"kind": "ready", "seconds": round(time.monotonic() - self.began, 1)})
        elif time.monotonic() - self.began > READY_WITHIN:
            late = [unit.service.name for unit in self.units.values() if unit.state != "ready"]
            raise TunesmithError(
                f"Not ready after {READY_WITHIN:.0f} s: {', '.join(late)}.", hint=f"Their logs: {self.home / 'logs'}"
            )

    def engines(self) -> None:
        """Start an engine for each wanted base, and stop those that nobody has wanted for a minute."""
        try:
            if self.connection is None:
                self.connection = psycopg.connect(self.settings.database(), autocommit=True, connect_timeout=2)
            rows = self.connection.execute(SQL["wanted_bases"], {"limit": self.settings.max_engines}).fetchall()
        except psycopg.Error:
            if self.connection is not None:
                self.connection.close()
            self.connection = None
            return
        wanted = {services.engine_name(row[0]): row[0] for row in rows}
        for name, base in wanted.items():
            if name not in self.units:
                port = ports.free(but=[*self.ports.values()])
                self.units[name] = Unit(service=services.engine(self.settings, base, port, self.mark))
        now = time.monotonic()
        for name, unit in list(self.units.items()):
            if not name.startswith("engine-"):
                continue
            unit.unwanted_since = None if name in wanted else unit.unwanted_since or now
            if unit.unwanted_since is not None and now - unit.unwanted_since > UNWANTED_ENGINE_SECONDS:
                self.end_units([unit])
                del self.units[name]
                self.save()

    def clear_dead_runs(self, *, own_pool: bool) -> None:
        try:
            dead = reconcile.reconcile(self.settings, own_pool=own_pool)
        except (TunesmithError, psycopg.Error):
            return  # again in half a minute
        if dead:
            self.report({"kind": "note", "text": f"{dead} flow run(s) whose process was gone are marked as crashed."})

    def stop(self) -> None:
        """End all, serving first and PostgreSQL last, and tell the home that nothing runs."""
        if self.connection is not None:
            self.connection.close()
        for tier in sorted({unit.service.tier for unit in self.units.values()}):
            self.end_units([unit for unit in self.units.values() if unit.service.tier == tier])
        if self.guard is not None and self.guard.stdin is not None:
            self.guard.stdin.close()  # sweeps what escaped
            self.guard.wait()
        state.write(
            self.home,
            StackState(
                pid=None,
                started=None,
                mark=self.mark,
                ready=False,
                services=tuple(unit.shown() for unit in self.units.values()),
                ports=self.ports,
            ),
        )

    def end_units(self, units: list[Unit]) -> None:
        """Ask, wait, kill; with them ends what they started, such as the flows of the runner."""
        started: list[psutil.Process] = []
        for unit in units:
            if unit.process is not None and unit.process.poll() is None:
                if unit.service.name != "postgres":
                    started += _descendants(unit.process.pid)
                unit.process.send_signal(unit.service.stop_signal)
        limit = time.monotonic() + max((unit.service.patience for unit in units), default=0)
        for unit in units:
            if unit.process is not None:
                while unit.process.poll() is None and time.monotonic() < limit and self.stopping < 2:
                    time.sleep(0.05)
                if unit.service.name == "postgres":
                    postgres.stop(unit.process, seconds=5)
                processes.signal_group(unit.process.pid, signal.SIGKILL)
                unit.process.wait()
                unit.process, unit.created = None, None
            if unit.state != "waiting":
                self.set(unit, "stopped")
        processes.end([process for process in started if process.is_running()])

    def set(self, unit: Unit, new: State, message: str = "") -> None:
        if unit.state != new:
            unit.state = new
            self.save()
            shown = unit.shown()
            self.report({"kind": "service", "name": shown.name, "state": new, "url": shown.url, "message": message})

    def save(self) -> None:
        names = ("database_url", "mlflow_url", "prefect_url", "gateway_url", "engine_secret")
        state.write(
            self.home,
            StackState(
                pid=os.getpid(),
                started=psutil.Process().create_time(),
                mark=self.mark,
                ready=self.ready,
                services=tuple(unit.shown() for unit in self.units.values()) + self.external(),
                ports=self.ports,
                settings={name: self.settings.need(name) for name in names}
                | {"port": self.settings.port, "database_prefix": self.settings.database_prefix},
            ),
        )

    def external(self) -> tuple[ServiceState, ...]:
        """The servers that the team already has."""
        found = []
        if self.own.database_url is not None:
            found.append(ServiceState(name="postgres", state="external"))
        if self.own.mlflow_url is not None:
            health = self.own.mlflow_url.rstrip("/") + "/health"
            found.append(ServiceState(name="mlflow", state="external", url=self.own.mlflow_url, health=health))
        if self.own.prefect_url is not None:
            url = self.own.prefect_url.removesuffix("/api")
            found.append(
                ServiceState(name="prefect", state="external", url=url, health=f"{self.own.prefect_url}/health")
            )
        return tuple(found)

    def log_of(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    def last_line(self, unit: Unit) -> str:
        try:
            with self.log_of(unit.service.name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "it wrote nothing"

    def every(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self.last_turn.get(what, 0.0) < seconds:
            return False
        self.last_turn[what] = now
        return True

    def rest(self, seconds: float) -> None:
        if self.stopping:
            raise Stop
        time.sleep(seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only noted: raised here, it could fall between a child's start and the note of its number.
        self.stopping += 1  # a second one ends the patience
        self.asked_by = self.asked_by or number


def rotate(path: Path, *, size: int = LOG_BYTES, kept: int = LOGS_KEPT) -> None:
    """When a log has more than `size` bytes, copy it to ``.1`` (older ones move up) and cut it; its writer, who has
    it open for appending, goes on at the start."""
    try:
        if path.stat().st_size <= size:
            return
        for number in range(kept, 1, -1):
            older = path.with_suffix(f".log.{number - 1}")
            if older.exists():
                older.replace(path.with_suffix(f".log.{number}"))
        shutil.copyfile(path, path.with_suffix(".log.1"))
        os.truncate(path, 0)
    except OSError:
        return  # a full disk must not end the stack


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
