"""Whose lease may be taken away: that of a process which is known to be dead, and of nobody else. How many processors
there are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from infra import processes

HERE, MOMENT = socket.gethostname(), timedelta(0)


def test_a_dead_holder_of_this_machine_is_gone_and_no_other() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes.is_gone(f"{HERE}:{ended.pid} train", MOMENT)
    assert not processes.is_gone(f"{HERE}:{os.getpid()} train", MOMENT)
    assert not processes.is_gone(f"another-{HERE}:{ended.pid} train", MOMENT)
    assert not processes.is_gone("a hand in the database", MOMENT)


def test_a_process_younger_than_the_lease_only_has_its_holders_number() -> None:
    assert processes.is_gone(f"{HERE}:{os.getpid()} train", timedelta(days=365))


@pytest.mark.parametrize(
    ("quota", "most"), [("max 100000\n", 10_000), ("50000 100000\n", 1), ("100001 100000\n", 2), ("", 10_000)]
)
def test_a_containers_quota_bounds_its_processors(
    quota: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota:
        file.write_text(quota)
    monkeypatch.setattr(processes, "_QUOTA", file)
    assert processes.cores() == min(most, len(os.sched_getaffinity(0)))


def test_a_zombie_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # ends with the process, which nobody has waited for yet
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.is_gone(f"{HERE}:{child.pid} train", MOMENT)
    child.wait()
    child.stdout.close()
