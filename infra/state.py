"""``<home>/stack.json``: what runs on a home, written by its supervisor alone; and the lock that makes it alone."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from infra import processes

# external: a server the team already has, that we use and do not start
State = Literal["waiting", "starting", "ready", "restarting", "stopped", "external"]


@dataclass(frozen=True, kw_only=True)
class ServiceState:
    name: str
    state: State
    url: str | None = None
    health: str | None = None
    pid: int | None = None
    started: float | None = None  # the process's creation time, which tells it from a later one of the same number


@dataclass(frozen=True, kw_only=True)
class StackState:
    """`settings` are what commands on this home read; empty when the stack is down."""

    pid: int | None
    started: float | None
    mark: str
    ready: bool
    services: tuple[ServiceState, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)  # kept when the stack is down: the next one prefers them
    settings: Mapping[str, Any] = field(default_factory=dict)

    def supervised(self) -> bool:
        """Whether the supervisor that wrote this lives."""
        return self.pid is not None and processes.alive(self.pid, self.started)


def read(home: Path) -> StackState | None:
    """What the last supervisor of this home wrote, or None; a file that is not ours counts as none."""
    try:
        found = json.loads((home / "stack.json").read_text())
        services = tuple(ServiceState(**service) for service in found.pop("services"))
        return StackState(services=services, **{"settings": {}, **found})
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(home: Path, state: StackState) -> None:
    """Replace the file at once, readable by its owner alone: it holds the database's password."""
    content = asdict(state)
    if not state.settings:
        del content["settings"]
    new = home / f".stack.json.{os.getpid()}"
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(json.dumps(content, indent=1))
    new.rename(home / "stack.json")


def lock(home: Path) -> IO[bytes] | None:
    """The home's lock, held until the returned file is closed or this process dies; None when another holds it."""
    file = (home / "stack.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def locked(home: Path) -> bool:
    """Whether a supervisor works on this home."""
    if not (home / "stack.lock").exists():
        return False
    held = lock(home)
    if held is None:
        return True
    held.close()
    return False
