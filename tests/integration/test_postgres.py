"""The embedded server, as whoever runs the tests (root and an ordinary user are both tried in CI)."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from infra import db, ports, postgres, processes
from infra.errors import TunesmithError
from infra.settings import Settings


def test_a_test_has_a_migrated_database_of_its_own(database: Settings) -> None:
    with db.transaction() as conn:
        assert db.one(conn, "select count(*) as n from model")["n"] == 0
        assert db.one(conn, "select current_database() as d")["d"] == database.database().rsplit("/", 1)[1]


def test_wrong_password_is_refused_and_the_right_one_is_private(home: Path) -> None:
    with postgres.running(home) as (cluster, port):
        wrong = cluster.url(port).replace(cluster.password, "guess")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(wrong)
        assert stat.S_IMODE((home / "postgres.password").stat().st_mode) == 0o600
        assert stat.S_IMODE(cluster.data.stat().st_mode) == 0o700
        with psycopg.connect(cluster.url(port)) as conn:
            hosts = conn.execute("select setting from pg_settings where name = 'listen_addresses'").fetchone()
    assert hosts == ("127.0.0.1",)


def test_a_killed_server_recovers_what_was_committed(home: Path) -> None:
    cluster, port = postgres.prepare(home), ports.free()
    server = cluster.start(port)
    cluster.wait(server, port)
    with psycopg.connect(cluster.url(port), autocommit=True) as conn:
        conn.execute("create table kept as select generate_series(1, 1000) as n")
    server.kill()
    server.wait()
    assert (cluster.data / "postmaster.pid").exists()
    again = postgres.prepare(home)
    server = again.start(port)
    try:
        again.wait(server, port)
        with psycopg.connect(again.url(port)) as conn:
            assert conn.execute("select count(*) from kept").fetchone() == (1000,)
    finally:
        postgres.stop(server)
    assert server.returncode == 0


def test_a_pid_file_that_names_another_program_is_not_believed(home: Path) -> None:
    cluster, port = postgres.prepare(home), ports.free()
    (cluster.data / "postmaster.pid").write_text(f"{os.getpid()}\n{cluster.data}\n1\n{port}\n\n127.0.0.1\n 0 0\n")
    server = cluster.start(port)
    try:
        cluster.wait(server, port)
    finally:
        postgres.stop(server)


def test_a_leftover_server_is_ended_before_the_next(home: Path) -> None:
    cluster, first, second = postgres.prepare(home), ports.free(), ports.free()
    leftover = cluster.start(first)
    cluster.wait(leftover, first)
    server = cluster.start(second)
    try:
        cluster.wait(server, second)
        assert leftover.wait(60) == 0
    finally:
        postgres.stop(server)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_the_server_ends_cleanly_when_its_supervisor_is_killed(home: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from infra import postgres, ports\n"
        "cluster, port = postgres.prepare(Path(sys.argv[1])), ports.free()\n"
        "server = cluster.start(port); cluster.wait(server, port); print(server.pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(home)], stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert processes.alive(pid)
        supervisor.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not processes.alive(pid):
            break
        signal.sigtimedwait([], 0.1)
    assert not processes.alive(pid)
    assert not (home / "postgres" / "data" / "postmaster.pid").exists()  # removed by a clean shutdown only


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root's PostgreSQL is another user")
def test_as_root_a_closed_parent_is_named_and_left_alone(home: Path) -> None:
    closed = home / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(TunesmithError, match=f"{postgres.NOBODY} may not enter {closed}"):
        postgres.prepare(closed / "home")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root's PostgreSQL is another user")
def test_as_root_unreachable_binaries_are_copied(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(postgres._binaries(home, postgres.NOBODY)).parents[1]
    monkeypatch.setattr(postgres, "_runs", lambda binaries, user: package not in binaries.parents)
    copied = postgres._binaries(home, postgres.NOBODY)
    assert home in copied.parents
    done = subprocess.run(
        [copied / "postgres", "--version"], user=postgres.NOBODY, group=postgres.NOBODY, extra_groups=[], cwd="/"
    )
    assert done.returncode == 0
