"""How gateways follow what is deployed: promotions under load, versions and engines that cannot be, several of them."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import engine_peer
import httpx
import pytest
from serving import Stand, add_base, add_engine, add_version, child, make_stand, promote, three_versions, wait_for

from deploy.follower import IDLE_VERSIONS
from infra import ports, storage
from infra.db import one, transaction
from infra.settings import Settings
from monitoring import alerts
from registry import deployments


@pytest.fixture
def stand(database: Settings) -> Iterator[Stand]:
    """Model ``demo`` with versions 1 to 3, of which 1 serves."""
    with three_versions(database.home) as stand:
        yield stand


def test_promotions_under_load(stand: Stand) -> None:
    """Nothing fails while versions come and go, and each answer is from the version it names."""
    stop = threading.Event()
    answers: list[tuple[int, str, str, str]] = []

    def load(stream: bool) -> None:
        with httpx.Client(trust_env=False, timeout=60) as http:
            while not stop.is_set():
                body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
                answer = http.post(f"{stand.url}/v1/chat/completions", json=body, headers=stand.header())
                if stream:
                    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
                    text = "".join(c["choices"][0]["delta"]["content"] for c in chunks)
                    model = chunks[0]["model"]
                else:
                    text, model = answer.json()["choices"][0]["message"]["content"], answer.json()["model"]
                answers.append((answer.status_code, answer.headers["x-tunesmith-version"], model, text.split()[0]))

    threads = [threading.Thread(target=load, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for number in (2, 3, 1, 2):
        promote("demo", number)
        wait_for(lambda number=number: answers and answers[-1][1] == f"demo:{number}", what=f"for demo:{number}")  # type: ignore[misc]
    loads = stand.stats()["loads"]
    with transaction() as conn:
        deployments.rollback(conn, "demo", actor="test", reason="worse")
    wait_for(lambda: answers[-1][1] == "demo:1", what="for the rollback")
    assert stand.stats()["loads"] == loads, "the rollback's target was still loaded"
    stop.set()
    for thread in threads:
        thread.join()
    assert {status for status, *_ in answers} == {200}
    assert {version for _, version, _, _ in answers} == {"demo:1", "demo:2", "demo:3"}
    for _, version, model, word in answers:
        assert version == model == word.replace("-v", ":")
    events = stand.wait_events(len(answers))
    assert len(events) == len(answers)
    with transaction() as conn:
        row = conn.execute("select generation, ready from replica where model = 'demo'").fetchone()
    assert row == {"generation": 6, "ready": True}


def damage(number: int) -> None:
    """Flip a bit of an adapter."""
    with transaction() as conn:
        row = conn.execute(
            "select bundle_digest from version where model = 'demo' and number = %s", (number,)
        ).fetchone()
    assert row is not None
    weights = storage.get("bundle", row["bundle_digest"]) / "adapter/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)


def test_a_version_that_does_not_become_ready_changes_nothing(stand: Stand) -> None:
    damage(2)
    promote("demo", 2)

    def told() -> Any:
        body = stand.http.get(f"{stand.url}/readyz", headers=stand.header("viewer")).json()
        # At first it is only not ready, and nobody knows yet why
        return "adapter_model.safetensors has digest" in body["models"]["demo"]["message"] and body

    assert wait_for(told)["status"] == "stale"
    assert stand.ask().headers["x-tunesmith-version"] == "demo:1"
    assert stand.ask("demo:2").status_code == 409
    with transaction() as conn:
        deployments.canary(conn, "demo", 3, share=0.99, actor="test", reason="try it", force=True)
    wait_for(lambda: stand.ask().headers["x-tunesmith-version"] == "demo:3", what="for the challenger of a stale one")
    with transaction() as conn:
        deployments.stop(conn, "demo", "challenger", actor="test", reason="enough")
    wait_for(lambda: [stand.ask().headers["x-tunesmith-version"] for _ in range(5)] == ["demo:1"] * 5)
    promote("demo", 3)
    wait_for(lambda: stand.ask().headers["x-tunesmith-version"] == "demo:3")


def test_a_gateway_that_begins_while_the_champion_is_damaged_serves_the_one_before(database: Settings) -> None:
    for number in (1, 2):
        add_version("demo", number)
        promote("demo", number)
    add_version("other", 1)
    promote("other", 1)
    damage(2)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        wait_for(lambda: stand._status() == 200)
        assert stand.ask().headers["x-tunesmith-version"] == "demo:1"
        assert stand.ask("other").status_code == 200
        body = stand.http.get(f"{stand.url}/readyz", headers=stand.header("viewer")).json()
        assert (body["status"], body["models"]["demo"]["ready"]) == ("stale", False)
        assert "adapter_model.safetensors has digest" in body["models"]["demo"]["message"]


def test_a_model_that_cannot_be_served_takes_no_other_away(database: Settings) -> None:
    for model in ("demo", "other"):
        add_version(model, 1)
        promote(model, 1)
    damage(1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        wait_for(lambda: stand._status() == 200)
        assert (stand.ask("demo").status_code, stand.ask("other").status_code) == (503, 200)


def test_a_sick_engine_holds_up_no_promotion(database: Settings) -> None:
    for number in (1, 2):
        add_version("demo", number)
    promote("demo", 1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and never says anything
        add_base()
        add_engine(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
            stand.wait_ready()
            assert all(stand.ask().status_code == 200 for _ in range(4)), "only who has it loaded is asked"
            promote("demo", 2)
            wait_for(lambda: stand.ask().headers["x-tunesmith-version"] == "demo:2", 10)


def test_who_waits_for_an_engine_that_is_gone_is_asked_elsewhere(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    port = ports.free()
    mute = f"http://127.0.0.1:{port}"
    with (
        make_stand(database.home) as stand,
        child(engine_peer.__file__, str(port), log=stand.home / "mute.log") as process,
        stand.running_engine(),
        stand.running_gateway(),
    ):
        add_engine(mute)
        stand.wait_ready()
        secret = {"authorization": f"Bearer {engine_peer.SECRET}"}
        wait_for(lambda: httpx.get(f"{mute}/stats", headers=secret, trust_env=False).json()["answered"])
        process.send_signal(signal.SIGSTOP)  # it takes connections, and never says anything again
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(stand.ask, text="hello", stream=bool(n % 2)) for n in range(8)]
            wait_for(lambda: sum(each.done() for each in asked) >= 4, what="for those that the other one answers")
            assert not all(each.done() for each in asked)
            with transaction() as conn:
                conn.execute("update engine set seen_at = now() - interval '1 minute' where url = %s", (mute,))
            answers = [each.result(timeout=60) for each in asked]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert all("word1" in answer.text for answer in answers)
        assert {event["status"] for event in stand.wait_events(8)} == {200}


def test_a_gateway_that_the_database_is_away_for_says_so(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()

        def ready() -> dict[str, Any]:
            found: dict[str, Any] = stand.http.get(f"{stand.url}/readyz", headers=stand.header("viewer")).json()
            return found

        with transaction() as conn:
            conn.execute("lock table deployment in access exclusive mode")  # whoever reads it waits
            told = wait_for(lambda: (body := ready())["status"] == "stale" and body)
            assert "a change since then is not followed" in told["message"]
            assert stand.ask().status_code == 200
        assert wait_for(lambda: ready()["status"] == "ready")
        process = stand.gateway
        assert process is not None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        with transaction() as conn:
            assert one(conn, "select count(*) as n from replica")["n"] == 0, "who ends well is no gateway any more"


def test_two_gateways_follow_and_each_says_what_it_cannot_serve(database: Settings, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        add_version("demo", number)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()
        first, own = stand.gateway, stand.url
        stand.url = f"http://127.0.0.1:{ports.free()}"
        with stand.running_gateway():
            stand.wait_ready()
            urls = (own, stand.url)

            def served(url: str) -> str:
                body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
                answer = stand.http.post(f"{url}/v1/chat/completions", json=body, headers=stand.header())
                return str(answer.headers["x-tunesmith-version"])

            promote("demo", 2)
            wait_for(lambda: [served(url) for url in urls] == ["demo:2"] * 2, 10)
            # One that was away when the next came, and finds its files damaged
            assert first is not None
            first.send_signal(signal.SIGSTOP)
            promote("demo", 3)
            wait_for(lambda: served(stand.url) == "demo:3", 10)
            damage(3)
            first.send_signal(signal.SIGCONT)

            def stale() -> bool:
                told = stand.http.get(f"{own}/readyz", headers=stand.header("viewer")).json()
                return bool(told["status"] == "stale")

            wait_for(stale, 20, "for the one that cannot follow")
            assert [served(url) for url in urls] == ["demo:2", "demo:3"]
            since: dict[str, Any] = {}
            with transaction() as conn:
                for later in (timedelta(0), timedelta(minutes=1)):
                    alerts.look_at_gateways(conn, since, datetime.now(UTC) + later)
                found = conn.execute("select rule, message from alert").fetchall()
            assert [alert["rule"] for alert in found] == [alerts.NOT_SERVING]
            assert "1 of 2 gateways could not follow the last change of demo (generation 3)" in found[0]["message"]


def test_of_pinned_versions_the_busy_one_stays_loaded(stand: Stand) -> None:
    most = IDLE_VERSIONS + 3
    for number in range(4, most + 1):
        add_version("demo", number)
    for number in range(2, most + 1):  # the first is asked between all others
        assert stand.ask(f"demo:{number}").status_code == 200
        assert stand.ask("demo:2").status_code == 200
    wait_for(lambda: len(stand.stats()["loaded"]) == IDLE_VERSIONS + 1, what="for the idle ones to go")
    assert stand.ask("demo:2").status_code == 200
    stats = stand.stats()
    assert stats["loads"] == most, "each once: the busy one was never let go"
    assert "demo-v3" not in stats["loaded"]


def test_an_outage_of_the_database_does_not_make_engines_dead(stand: Stand) -> None:
    """Engines cannot write while it is away; when it is back their rows look old for a moment."""
    with transaction() as conn:
        conn.execute("update engine set seen_at = now() - interval '1 minute'")
    until = time.monotonic() + 5
    while time.monotonic() < until:
        assert stand.ask().status_code == 200
        time.sleep(0.1)
    wait_for(lambda: stand.ask().status_code == 503)
    with transaction() as conn:
        conn.execute("update engine set seen_at = now() + interval '1 hour'")
    wait_for(lambda: stand.ask().status_code == 200)
