"""Faults 4 and 17, in serving: the database's server goes down at once, under requests, and comes back in a minute."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psycopg
import pytest
from serving import add_version, make_stand

from infra import db, migrate, ports, postgres, settings
from registry import deployments


@pytest.mark.slow
def test_requests_go_on_through_an_immediate_restart_and_every_one_is_recorded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, port = postgres.prepare(home), ports.free()
    server = cluster.start(port)
    try:
        cluster.wait(server, port)
        monkeypatch.setenv("TUNESMITH_DATABASE_URL", cluster.url(port))
        settings.get_settings.cache_clear()
        with psycopg.connect(cluster.url(port), autocommit=True) as conn:
            conn.execute("create database tunesmith")
        migrate.migrate(cluster.url(port, "tunesmith"))
        for number in (1, 2):
            add_version("demo", number)
        with db.transaction() as own:
            deployments.promote(own, "demo", 1, actor="test", reason="test", force=True)
        with make_stand(home) as stand, stand.running_engine(), stand.running_gateway():
            stand.wait_ready()
            stop, statuses = threading.Event(), []

            def load() -> None:
                while not stop.is_set():
                    statuses.append(stand.ask(stream=len(statuses) % 2 == 0).status_code)

            threads = [threading.Thread(target=load) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(2)
            server.send_signal(signal.SIGQUIT)  # as `pg_ctl stop -m immediate`
            server.wait(30)
            time.sleep(60)
            server = cluster.start(port)
            cluster.wait(server, port)
            time.sleep(3)
            stop.set()
            for thread in threads:
                thread.join()
            assert set(statuses) == {200}
            assert len(statuses) > 100
            assert len(stand.wait_events(len(statuses))) == len(statuses)
            with db.transaction() as own:
                deployments.promote(own, "demo", 2, actor="test", reason="test", force=True)
            until = time.monotonic() + 30
            while stand.ask().json()["model"] != "demo:2":
                assert time.monotonic() < until, "the gateway follows no more"
                time.sleep(0.1)
    finally:
        if db.pool.cache_info().currsize:
            db.pool().close()
        db.pool.cache_clear()
        postgres.stop(server)
