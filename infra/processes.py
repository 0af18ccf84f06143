"""Child processes that do not outlive us, and the ends of those that did."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import psutil

MARK = "TUNESMITH_STACK"  # in the environment of every process of a stack, handed on to all it starts
_PR_SET_PDEATHSIG = 1
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in a period, or max


def cores() -> int:
    """Processors that this process may use, as many of them as its container's quota keeps busy."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (_QUOTA.read_text() if _QUOTA.is_file() else "max").strip().partition(" ")
    return min(count, math.ceil(int(quota) / int(period))) if quota.isdigit() and period.isdigit() else count


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    output: IO[Any] | int | None = None,
    death_signal: int = signal.SIGTERM,
    user: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own; on Linux it gets `death_signal` when the calling thread ends, so
    call this from a thread that lives as long as the process shall: the main one.

    `user` is a numeric id to run as (group of the same number, no other groups), which needs root.
    """
    return subprocess.Popen(
        list(argv),
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        process_group=0,
        preexec_fn=_dies_with_parent(death_signal),
        user=user,
        group=user,
        extra_groups=[] if user is not None else None,
    )


def _dies_with_parent(death_signal: int) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def prepare() -> None:  # runs after the change of user, which would have cleared the setting
        libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the group that `spawn` made; silent when it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def alive(pid: int, started: float | None = None) -> bool:
    """Whether the process runs (a zombie does not) and, with `started`, is the one that was created then."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < 2
    except psutil.Error:
        return False


def is_gone(holder: str, held: timedelta) -> bool:
    """Whether a lease's holder, ``host:pid what for``, was a process of this machine that does not live. A process
    that is younger than the lease, held for so long by the database's clock, only has its number."""
    host, _, rest = holder.partition(":")
    pid = rest.partition(" ")[0]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        process = psutil.Process(int(pid))
        age = time.time() - process.create_time()  # not compared with the database's times: its clock may be another
        return process.status() == psutil.STATUS_ZOMBIE or age < held.total_seconds() - 2
    except psutil.NoSuchProcess:
        return True


def marked(mark: str) -> list[psutil.Process]:
    """All living processes of the stack with this mark, also those whose parent died, not this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's
    return found


def end(processes: Iterable[psutil.Process], *, seconds: float = 10) -> None:
    """Ask processes to end, wait, and kill those that are left."""
    left = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            try:
                process.send_signal(number)
            except psutil.Error:
                continue
        _, left = psutil.wait_procs(left, timeout=seconds)
        if not left:
            return
