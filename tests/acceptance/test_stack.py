"""The local stack as a person has it: real processes, killed for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from infra import processes, state
from tests.stacks import Stack, new_folder, tunesmith


@pytest.fixture
def other_home() -> Iterator[Path]:
    folder = new_folder()
    yield folder
    tunesmith(folder, "down")
    shutil.rmtree(folder, ignore_errors=True)


def services(home: Path) -> dict[str, state.ServiceState]:
    found = state.read(home)
    assert found is not None
    return {service.name: service for service in found.services}


def until(what: Callable[[], bool], seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.2)


def processes_of(home: Path) -> list[psutil.Process]:
    """Whatever runs for this home: by its mark, and by its path on the command line."""
    found = state.read(home)
    assert found is not None
    by_path = [p for p in psutil.process_iter() if str(home) in " ".join(_command_line(p))]
    return [*processes.marked(found.mark), *by_path]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_running_stack_tells_its_state_and_a_second_up_changes_nothing(stack: Stack) -> None:
    status = stack.tunesmith("status", "--json")
    assert status.returncode == 0, status.stdout
    shown = {service["name"]: service for service in json.loads(status.stdout)["services"]}
    assert {"postgres", "mlflow", "prefect", "gateway", "watcher", "runner"} <= set(shown)
    assert {service["state"] for service in shown.values()} == {"ready"}
    before = state.read(stack.home)
    again = stack.tunesmith("up", "--detach", "--json")
    assert again.returncode == 0
    assert "key" not in json.loads(again.stdout)  # shown once
    assert state.read(stack.home) == before
    for secret in (stack.home / "stack.json", stack.home / "postgres.password"):
        assert secret.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["watcher", "gateway", "postgres"])
def test_what_dies_is_started_again(stack: Stack, name: str) -> None:
    killed = services(stack.home)[name]
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    until(lambda: services(stack.home)[name].pid not in (killed.pid, None))
    until(lambda: stack.tunesmith("status").returncode == 0)


def test_servers_stay_within_their_memory(stack: Stack) -> None:
    if sys.platform != "linux":
        pytest.skip("proportional set size is Linux's")
    engines = {s.pid for name, s in services(stack.home).items() if name.startswith("engine-")}
    total = 0
    for service in services(stack.home).values():
        if service.pid is not None and service.pid not in engines:
            parent = psutil.Process(service.pid)
            total += sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)])
    assert total < 1.2e9, f"{total / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_home_takes_other_ports_and_leaves_nothing_behind(stack: Stack, other_home: Path) -> None:
    up = tunesmith(other_home, "up", "--detach", "--json")
    assert up.returncode == 0, up.stderr
    theirs = {s["url"] for s in json.loads(up.stdout)["services"] if s["url"]}
    ours = {s.url for s in services(stack.home).values() if s.url}
    assert not theirs & ours
    assert "is taken: gateway listens on" in up.stderr
    assert processes_of(other_home)
    down = tunesmith(other_home, "down")
    assert down.returncode == 0, down.stderr
    assert processes_of(other_home) == []
    status = tunesmith(other_home, "status", "--json")
    assert status.returncode == 6
    assert {s["state"] for s in json.loads(status.stdout)["services"]} == {"stopped"}
    assert stack.tunesmith("status").returncode == 0
    if sys.platform == "linux":  # and when even the supervisor is killed
        assert tunesmith(other_home, "up", "--detach").returncode == 0
        found = state.read(other_home)
        assert found is not None
        assert found.pid is not None
        os.kill(found.pid, signal.SIGKILL)
        until(lambda: processes_of(other_home) == [])
        assert tunesmith(other_home, "status").returncode == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_at_once_start_one_stack(other_home: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "up", "--detach", "--json"],
            env=os.environ | {"TUNESMITH_HOME": str(other_home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=600) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    urls = [{s["name"]: s["url"] for s in json.loads(out)["services"]} for out, _ in said]
    assert urls[0] == urls[1]
    assert sum("key" in json.loads(out) for out, _ in said) == 1


def test_a_taken_port_and_an_unreachable_database_are_refused_with_a_sentence(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for arguments, env in (
            (["--port", port], {}),
            ([], {"TUNESMITH_PORT": port}),
            (["--detach"], {"TUNESMITH_PORT": port}),
        ):
            up = tunesmith(home, "up", "--json", *arguments, **env)
            assert up.returncode == 2, up.stderr
            assert f"Port {port} on 127.0.0.1 is taken." in json.loads(up.stdout)["error"]["message"]
    gone = tunesmith(home, "up", "--detach", "--json", TUNESMITH_DATABASE_URL="postgresql://u:p@127.0.0.1:1/x")
    assert gone.returncode == 6
    assert "does not answer" in json.loads(gone.stdout)["error"]["message"]
    assert "Traceback" not in gone.stderr
    assert processes_of(home) == []
