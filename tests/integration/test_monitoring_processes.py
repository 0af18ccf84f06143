"""`tunesmith watch` and `tunesmith serve` as processes, with the faults they meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil
import psycopg
import pytest
import serving
import traffic

from deploy import recorder
from infra import migrate, ports, postgres
from infra.db import one, transaction
from infra.errors import TunesmithError
from infra.settings import Settings, get_settings
from infra.storage import text_digest

OLD = [(f"pathlib.Path.m{i}(self, path, mode=0o777)", f"Do what number {i} does to a path.") for i in range(200)]
NEW = [(f"torch.op{i}(tensor, axis=-1, dtype=None, keepdims=False)", f"Reduce a tensor, {i}.") for i in range(200)]
PROFILE = traffic.profile(OLD, OLD)


@contextmanager
def tunesmith(home: Path, *arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    log = home / f"{arguments[0]}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments], env=os.environ | env, cwd=home, stderr=file
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def stop(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def test_the_watcher_outlives_the_database_and_is_small(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, port = postgres.prepare(home), ports.free()
    server = cluster.start(port)
    cluster.wait(server, port)
    with psycopg.connect(cluster.url(port), autocommit=True) as conn:
        conn.execute("create database tunesmith")
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", cluster.url(port))
    get_settings.cache_clear()
    migrate.migrate(get_settings().database())
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})

    def send(pairs: list[traffic.Pair]) -> None:
        with transaction() as conn:
            recorder.store(conn, uuid.uuid4(), [traffic.event("m", 1, PROFILE, pair) for pair in pairs])

    def ask(query: Any) -> Any:
        try:
            with transaction() as conn:
                return one(conn, query)["value"]
        except (TunesmithError, LookupError):
            return None

    def windowed() -> Any:
        return ask("select coalesce(sum(requests), 0)::int as value from traffic_window where grain = 'day'")

    def verdict() -> Any:
        return ask("select verdict as value from verdict order by at desc limit 1")

    try:
        with tunesmith(home, "watch") as watcher:
            send(OLD)
            serving.wait_for(lambda: windowed() == 200)
            serving.wait_for(lambda: verdict() == "stable")
            server.send_signal(signal.SIGQUIT)  # immediate: as a crash
            server.wait(60)
            time.sleep(3)
            server = cluster.start(port)
            cluster.wait(server, port)
            serving.wait_for(lambda: ask("select 1 as value"))
            send(NEW)
            serving.wait_for(lambda: windowed() == 400)
            serving.wait_for(lambda: verdict() == "drift")
            serving.wait_for(lambda: ask("select count(*) as value from alert where closed_at is null"))
            assert watcher.poll() is None
            assert psutil.Process(watcher.pid).memory_info().rss < 90 * 2**20
            busy = sum(psutil.Process(watcher.pid).cpu_times()[:2])
            time.sleep(3)
            assert sum(psutil.Process(watcher.pid).cpu_times()[:2]) - busy < 0.6, "idle is cheap"
            assert stop(watcher) == 0
            assert ask("select count(*) as value from lease where name = 'watch' and expires_at > now()") == 0
        assert "Traceback" not in (home / "watch.log").read_text()
    finally:
        postgres.stop(server)


def test_feedback_and_foreign_events_over_http(database: Settings) -> None:
    home = database.home
    with serving.make_stand(home) as stand, stand.running_engine():
        serving.add_version("demo", 1, settings={"monitoring": {"keep_text": True}})
        with transaction() as conn:
            traffic.serve(conn, "demo", 1)
        port = stand.url.rsplit(":", 1)[1]
        env = {"TUNESMITH_PORT": port, "TUNESMITH_ENGINE_SECRET": serving.engine_peer.SECRET}
        with tunesmith(home, "serve", **env) as process:
            stand.wait_ready()
            serving.wait_for(lambda: stand.ask().status_code == 200)

            def post(path: str, body: Any, role: str = "service") -> Any:
                data = body if isinstance(body, bytes) else orjson.dumps(body)
                return stand.http.post(f"{stand.url}{path}", content=data, headers=stand.header(role))

            answer = stand.ask()
            named = stand.http.post(
                f"{stand.url}/v1/chat/completions",
                json={"model": "demo", "messages": [{"role": "user", "content": "hi"}]},
                headers=stand.header() | {"x-request-id": "mine-1"},
            )
            given = post("/v1/feedback", {"id": answer.json()["id"], "score": 1})  # perhaps before its event
            assert given.status_code == 200, given.text
            assert answer.json()["id"] == "chatcmpl-" + given.json()["request_id"]
            stand.wait_events(3)
            by_name = post("/v1/feedback", {"request_id": "mine-1", "score": -1, "correction": "hello"})
            assert by_name.json()["request_id"] in named.json()["id"]
            for role, status in (("viewer", 403), ("operator", 200)):
                assert post("/v1/feedback", {"id": answer.json()["id"], "score": 0}, role).status_code == status
            for bad in ({"id": "x"}, {"id": answer.json()["id"], "score": 7}, b"{", b"null", b"\xff"):
                refused = post("/v1/feedback", bad)
                assert refused.status_code == 400, refused.text
                assert refused.json()["error"]["message"]
            assert post("/v1/feedback", {"id": "nobody-knows", "score": 1}).status_code == 404
            assert stand.http.post(f"{stand.url}/v1/feedback", json={}).status_code == 401

            event = {
                "id": str(traffic.uuid7(traffic.minutes_ago(2))),
                "model": "demo",
                "version": 1,
                "status": 200,
                "latency_ms": 80,
                "prompt_tokens": 4,
                "completion_tokens": 2,
                "messages": [{"role": "user", "content": "mail ada@example.org"}],
                "answer": "done",
            }
            lines = (
                orjson.dumps(event) + b"\n" + orjson.dumps({**event, "id": str(traffic.uuid7(traffic.minutes_ago(1)))})
            )
            assert post("/v1/events", lines, "operator").json() == {"events": 2, "new": 2}
            assert post("/v1/events", lines, "operator").json() == {"events": 2, "new": 0}
            assert post("/v1/events", lines).status_code == 403
            wrong = post("/v1/events", lines + b"\n{\n" + orjson.dumps({**event, "id": str(uuid.uuid4())}), "operator")
            assert wrong.status_code == 400
            assert "line 3: not JSON" in wrong.text
            assert "line 4: id: must be a UUIDv7" in wrong.text
            assert post("/v1/events", orjson.dumps({**event, "version": 9}), "operator").status_code == 400
            for minutes in (-120, 31 * 24 * 60):
                other = {**event, "id": str(traffic.uuid7(traffic.minutes_ago(minutes)))}
                refused = post("/v1/events", orjson.dumps(other), "operator")
                assert refused.status_code == 400
                assert "line 1: id: its time must be of the last 30 days" in refused.text
            priced = {**event, "id": str(traffic.uuid7(traffic.minutes_ago(1))), "engine_seconds": 36, "user": "ada"}
            assert post("/v1/events", orjson.dumps(priced), "operator").json() == {"events": 1, "new": 1}
            [stored] = [e for e in stand.events() if str(e["id"]) == priced["id"]]
            assert stored["cost_usd"] == pytest.approx(0.001), "at the price of a machine hour, 0.10 dollars"
            assert stored["subject"] == text_digest("ada")
            kept = next(e for e in stand.events() if str(e["id"]) == event["id"])
            assert kept["messages"] == [{"role": "user", "content": "mail [EMAIL]"}]
            assert kept["features"][0] == 4

            assert stop(process) == 0
        assert "Traceback" not in (home / "serve.log").read_text()
