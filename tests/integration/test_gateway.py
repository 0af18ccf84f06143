"""The gateway as a process, with PostgreSQL and an engine that can be asked for faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from psycopg.types.json import Jsonb
from serving import Stand, add_version, make_stand, promote, three_versions, wait_for

from deploy.follower import Follower
from deploy.upstream import Upstream
from infra.db import transaction
from infra.settings import Settings
from registry import deployments

LOAD = Path(__file__).parents[1] / "benchmarks" / "gateway_peer.py"


@pytest.fixture
def stand(database: Settings) -> Iterator[Stand]:
    """Model ``demo`` with versions 1 to 3, of which 1 serves."""
    with three_versions(database.home) as stand:
        yield stand


def test_the_official_client(stand: Stand) -> None:
    with openai.OpenAI(base_url=f"{stand.url}/v1", api_key=stand.keys["service"], max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        raw = client.chat.completions.with_raw_response.create(
            model="demo", messages=messages, user="ann", extra_headers={"x-request-id": "mine"}
        )
        answer = raw.parse()
        assert answer.model == "demo:1"
        assert answer.choices[0].message.content == "demo-v1 word0 word1"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        assert raw.headers["x-tunesmith-version"] == "demo:1"
        assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"
        assert int(raw.headers["x-ratelimit-remaining-requests"]) < int(raw.headers["x-ratelimit-limit-requests"])

        chunks = list(client.chat.completions.create(model="demo@champion", messages=messages, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "demo-v1 word0 word1"
        assert {c.model for c in chunks} == {"demo:1"}
        assert len({c.id for c in chunks}) == 1
        counted = list(
            client.chat.completions.create(
                model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        )
        assert counted[-1].usage is not None
        assert client.completions.create(model="demo:2", prompt="hello").choices[0].text.startswith("demo-v2")
        assert {m.id for m in client.models.list()} >= {"demo", "demo:1", "demo:2"}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=messages)
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="demo:99", messages=messages)
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="demo", messages=messages, n=10**6)
        assert wrong.value.param == "n"
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    # The version's own prompt and defaults were applied, and the user's name went no further.
    first = next(b for b in stand.stats()["bodies"] if b["messages"][-1]["content"] == "hello")
    assert first["messages"][0] == {"role": "system", "content": "You are version 1."}
    assert (first["max_tokens"], first["temperature"]) == (17, 0.25)
    assert "user" not in first

    events = stand.wait_events(7)
    asked, streamed = events[0], events[1]
    assert str(asked["id"]) == raw.headers["x-request-id"]
    assert (asked["model"], asked["version"], asked["slot"], asked["status"]) == ("demo", 1, "champion", 200)
    assert (asked["client_request_id"], asked["prompt_tokens"], asked["completion_tokens"]) == ("mine", 5, 3)
    assert asked["cost_usd"] == pytest.approx(0.01 / 3600 * 0.1)
    assert asked["subject"].startswith("sha256:")
    assert asked["messages"] is None
    assert asked["features"][0] == 5.0
    assert streamed["stream"]
    assert 0 < streamed["ttft_ms"] <= streamed["latency_ms"]
    assert [e["status"] for e in events].count(404) == 2
    assert [e["version"] for e in events if e["status"] in (400, 404)] == [None, None, None]


def test_bad_input_is_refused_in_openais_shape(stand: Stand) -> None:
    good = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
    names = ["../x", "%2e%2e", "a\x1b[31m", "\u202eevil", "A", "x" * 10_000, "a..b", " demo", "demo:0", 7, ["demo"]]
    wrong: list[tuple[dict[str, Any], str | None]] = [
        ({"model": name}, "model") for name in names
    ] + [
        ({"priority": -1}, "priority"), ({"priority": True}, "priority"),
        ({"n": 10**6}, "n"), ({"n": 0}, "n"), ({"n": True}, "n"), ({"n": "1"}, "n"), ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"), ({"top_p": -1}, "top_p"), ({"stream": "yes"}, "stream"),
        ({"stop": [""]}, "stop"), ({"stop": ["x"] * 17}, "stop"), ({"user": {"a": 1}}, "user"), ({"seed": 2.5}, "seed"),
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages[0].content"),
        ({"stream_options": 3}, "stream_options"), ({"logprobs": 3}, "logprobs"),
    ]  # fmt: skip
    for change, param in wrong:
        answer = stand.http.post(f"{stand.url}/v1/chat/completions", json=good | change, headers=stand.header())
        assert answer.status_code == 400, (change, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, change
        assert len(answer.content) < 1000
        if "model" in change:
            assert "^[a-z0-9][a-z0-9-]{0,62}$" in error["hint"]
    raw: list[tuple[bytes, int]] = [
        (b"{", 400), (b"[]", 400), (b'"x"', 400), (b"\xff\xfe", 400), (b'{"a":' * 5000, 400),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}', 400), (b"x" * (2**20 + 1), 413),
    ]  # fmt: skip
    for body, status in raw:
        answer = stand.http.post(f"{stand.url}/v1/chat/completions", content=body, headers=stand.header())
        assert answer.status_code == status, body[:50]
    endless = stand.http.post(
        f"{stand.url}/v1/chat/completions", content=(b" " * 65536 for _ in range(100)), headers=stand.header()
    )
    assert endless.status_code == 413
    assert stand.ask().status_code == 200
    events = stand.wait_events(len(wrong) + len(raw) + 2)
    assert len(events) == len(wrong) + len(raw) + 2
    assert {e["version"] for e in events if e["status"] != 200} == {None}


def test_nobody_gets_in_without_the_right_key(stand: Stand) -> None:
    """Walks every route of the whole application, pages and feedback included."""
    from deploy.gateway import create_app
    from infra.settings import get_settings
    from monitoring.console.app import console_routes
    from monitoring.routes import routes

    values = {"{model}": "demo", "{number}": "1", "{key_id}": "abc", "{id}": "x", "{run_id}": "x", "{name}": "x"}
    values |= {"{which}": "1", "{name:path}": "version.json"}

    def walk(routes: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
        for route in routes:
            path = prefix + route.path
            if getattr(route, "routes", None):
                yield from walk(route.routes, path)
            elif hasattr(route, "methods"):
                for name, value in values.items():
                    path = path.replace(name, value)
                assert "{" not in path
                yield from ((method, path) for method in route.methods)

    found = set(walk(create_app(get_settings(), routes=[*routes(), *console_routes()]).routes))
    assert len(found) > 40
    public = {"/healthz", "/readyz", "/login", "/favicon.ico"}
    service_may = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/demo", "/metrics"}
    service_may |= {"/v1/feedback", "/api/v1/docs", "/api/v1/openapi.json"}
    last = stand.keys["admin"][-1]
    forged = stand.keys["admin"][:-1] + ("0" if last != "0" else "1")
    for method, path in sorted(found):
        if path in public:
            if method == "GET":
                assert stand.http.request(method, stand.url + path).status_code in (200, 308, 404)
            continue
        for header in ({}, {"authorization": f"Bearer {forged}"}):
            answer = stand.http.request(method, stand.url + path, headers=header)
            assert answer.status_code == 401, (method, path)
            assert "script-src 'self'" in answer.headers["content-security-policy"]
        answer = stand.http.request(method, stand.url + path, headers=stand.header("service"))
        assert (answer.status_code != 403) == (path in service_may), (method, path, answer.text)
        writes = method not in ("GET", "HEAD")
        if writes and path not in ("/logout",):
            assert stand.http.request(method, stand.url + path, headers=stand.header("viewer")).status_code == 403, path
        if path.startswith("/api/v1/keys"):
            assert stand.http.request(method, stand.url + path, headers=stand.header("operator")).status_code == 403
    for header in ({"authorization": "Basic eDp5"}, {"authorization": "Bearer"}, {"cookie": "tunesmith_session=x"}):
        assert stand.http.get(f"{stand.url}/v1/models", headers=header).status_code == 401
    # A browser without a session is shown the way in.
    page = stand.http.get(f"{stand.url}/models/x?y=1", headers={"accept": "text/html"})
    assert (page.status_code, page.headers["location"]) == (303, "/login?next=/models/x%3Fy%3D1")
    # A new key works at once, a revoked one stops within seconds.
    made = stand.http.post(
        f"{stand.url}/api/v1/keys", json={"name": "temp", "role": "service"}, headers=stand.header("admin")
    ).json()
    header = {"authorization": f"Bearer {made['key']}"}
    assert stand.http.get(f"{stand.url}/v1/models", headers=header).status_code == 200
    gone = stand.http.delete(f"{stand.url}/api/v1/keys/{made['id']}", headers=stand.header("admin"))
    assert gone.status_code == 200
    wait_for(lambda: stand.http.get(f"{stand.url}/v1/models", headers=header).status_code == 401)


async def test_following_ends_when_asked_whatever_is_heard_meanwhile(database: Settings) -> None:
    for turns in range(8):
        follower = Follower(database, Upstream(None), uuid.uuid4())
        task = asyncio.create_task(follower.run())
        while not follower.synced:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # it waits for a change
        follower._changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        assert await asyncio.wait({task}, timeout=20) == ({task}, set()), turns


@pytest.mark.parametrize(
    ("lost", "instead"),
    [("Follower._listen", lambda *_: None), ("POLL_SECONDS", 60.0)],
    ids=["by looking where listening is lost", "heard, where looking once a second would hide that nothing is"],
)
async def test_a_change_is_seen(database: Settings, monkeypatch: pytest.MonkeyPatch, lost: str, instead: Any) -> None:
    monkeypatch.setattr(f"deploy.follower.{lost}", instead)
    for number in (1, 2):
        add_version("demo", number)
    promote("demo", 1)
    follower = Follower(database, Upstream(None), uuid.uuid4())
    task = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(20):
            while "demo:1 is not ready" not in follower.applied.get("demo", (0, False, ""))[2]:
                await asyncio.sleep(0.05)
        for number in (2, 1, 2):
            await asyncio.sleep(0.5)  # it has read all that there was to read
            promote("demo", number)
            async with asyncio.timeout(10):
                while f"demo:{number} is not ready" not in follower.applied["demo"][2]:
                    await asyncio.sleep(0.05)
    finally:
        task.cancel()
        await asyncio.wait({task})


MIB = 2**20


def pieces(size: int, counted: list[int]) -> Iterator[bytes]:
    """A body that says nothing of its size beforehand."""
    for _ in range(size // 65_536):
        counted.append(65_536)
        yield b" " * 65_536


@pytest.mark.parametrize("path", ["/api/v1/models/demo/promote", "/v1/feedback", "/models/demo/rollback", "/login"])
def test_no_route_reads_more_than_its_limit(stand: Stand, path: str) -> None:
    header = stand.header("operator") | {"origin": stand.url}
    if path.startswith(("/models", "/login")):
        header |= {"accept": "text/html", "content-type": "application/x-www-form-urlencoded"}
    else:
        header |= {"content-type": "application/json"}
    with httpx.Client(trust_env=False, timeout=60) as http:
        told = http.post(stand.url + path, content=b"reason=" + b"x" * MIB, headers=header)
        sent: list[int] = []
        with suppress(httpx.WriteError, httpx.ReadError):  # the connection closes under what is sent on
            found = http.post(stand.url + path, content=pieces(256 * MIB, sent), headers=header)
            assert found.status_code == 413
    assert told.status_code == 413
    assert told.headers["connection"] == "close"
    assert "1,048,576 bytes" in told.text
    assert ("<h1>413</h1>" in told.text) == ("accept" in header)
    assert sum(sent) < 64 * MIB, "more was taken than the buffers of a connection hold"
    assert stand.ask().status_code == 200


def test_bodies_up_to_the_limit_are_read_and_roles_are_asked_first(stand: Stand) -> None:
    feedback = {"request_id": "x" * 100, "correction": "y"}
    padded = json.dumps(feedback).encode().ljust(MIB)
    answer = stand.http.post(f"{stand.url}/v1/feedback", content=padded, headers=stand.header())
    assert answer.status_code == 404, "read, but no such request"
    many = b"\n" * (2 * MIB)
    assert stand.http.post(f"{stand.url}/v1/events", content=many, headers=stand.header("admin")).status_code == 200
    sent: list[int] = []
    with suppress(httpx.WriteError, httpx.ReadError):
        found = stand.http.post(
            f"{stand.url}/api/v1/models/demo/promote", content=pieces(MIB, sent), headers=stand.header("service")
        )
        assert found.status_code == 403
    form = stand.http.post(
        f"{stand.url}/models/demo/rollback",
        content="&".join(f"a{i}=" for i in range(40)),
        headers=stand.header("operator") | {"content-type": "application/x-www-form-urlencoded"},
    )
    assert (form.status_code, form.headers["content-type"]) == (400, "text/html; charset=utf-8")
    assert "Too many fields" in form.text


def test_nul_in_an_address_is_refused_everywhere(stand: Stand) -> None:
    for path in (
        "/requests?model=%00",
        "/studies/%00",
        "/models/a%00b",
        "/api/v1/models/%00/history",
        "/v1/models/%00",
    ):
        answer = stand.http.get(stand.url + path, headers=stand.header("admin"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "usage"), path
        page = stand.http.get(stand.url + path, headers=stand.header("admin") | {"accept": "text/html"})
        assert (page.status_code, "NUL character" in page.text, "<h1>400</h1>" in page.text) == (400, True, True), path
    assert stand.http.get(f"{stand.url}/login?next=%00").status_code == 400
    form = {"reason": "a\0b", "to": "1"}
    refused = stand.http.post(f"{stand.url}/models/demo/rollback", data=form, headers=stand.header("admin"))
    assert refused.status_code == 400


def test_a_body_that_does_not_come_is_not_waited_for(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway(body_seconds=1.0):
        stand.wait_ready()
        host, port = stand.url.removeprefix("http://").split(":")
        lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-length: 100"]
        lines += [f"{name}: {value}" for name, value in stand.header().items()]
        head = "\r\n".join([*lines, "content-type: application/json", "", '{"model": ']).encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head)
            client.settimeout(30)
            said = client.recv(10_000).decode()
        assert said.startswith("HTTP/1.1 408")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head)  # and hang up
        assert sorted(event["status"] for event in stand.wait_events(2)) == [408, 499]
        assert "Traceback" not in (stand.home / "gateway.log").read_text()


def test_a_client_that_stops_reading_is_let_go(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway(send_seconds=1.0):
        stand.wait_ready()
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "flood"}], "stream": True})
        host, port = stand.url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"content-length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in stand.header().items()]
            client.sendall("\r\n".join([*lines, "content-type: application/json", "", body]).encode())
            [event] = stand.wait_events(1)
        assert (event["status"], event["error"]) == (499, "the client read nothing for 1 s")
        assert wait_for(lambda: stand.stats()["active"] == 0)


def test_shares_are_sticky_and_shadows_silent(stand: Stand) -> None:
    with transaction() as conn:
        deployments.canary(conn, "demo", 2, share=0.3, actor="t", reason="try it")
        deployments.shadow(conn, "demo", 3, actor="t")
    wait_for(lambda: stand.ask("demo@challenger").status_code == 200)
    chosen = {f"user{i}": stand.ask(user=f"user{i}").json()["model"] for i in range(100)}
    assert 15 <= sum(model == "demo:2" for model in chosen.values()) <= 45
    for user in list(chosen)[:10]:
        assert stand.ask(user=user).json()["model"] == chosen[user]
    with transaction() as conn:
        deployments.canary(conn, "demo", 2, share=0.6, actor="t", reason="more of it", force=True)
    time.sleep(1.5)
    grown = {user: stand.ask(user=user).json()["model"] for user in chosen}
    assert all(grown[user] == "demo:2" for user, model in chosen.items() if model == "demo:2")
    # Whoever names no user has the share all the same, with one key
    assert 40 <= sum(stand.ask().json()["model"] == "demo:2" for _ in range(100)) <= 80
    events = wait_for(lambda: [e for e in stand.events() if e["slot"] == "shadow"])
    assert {e["version"] for e in events} == {3}
    assert {e["client_request_id"] for e in events} <= {str(e["id"]) for e in stand.events()}
    metrics = stand.http.get(f"{stand.url}/metrics", headers=stand.header("viewer")).text
    assert 'tunesmith_shadow_answers_total{answer="other",version="demo:3"}' in metrics


def _followed() -> bool:
    """Whether the gateway serves by the newest generation: that an engine has loaded a version comes before."""
    with transaction() as conn:
        rows = conn.execute(
            "select r.generation >= d.generation as whole from replica r join deployment d using (model)"
        )
        return all(row["whole"] for row in rows)


def test_what_nobody_waits_for_makes_way(stand: Stand) -> None:
    """Copies always, a client's request where it says so; how long they waited is no part of their latency."""
    with transaction() as conn:
        deployments.shadow(conn, "demo", 3, actor="t")
    wait_for(_followed, what="for the shadow")
    assert stand.ask(text="queued").headers["x-tunesmith-queue-ms"] == "3600000"
    assert stand.ask(text="queued", priority=7).status_code == 200
    events = stand.wait_events(4)
    told = {
        (b["model"], b.get("priority")) for b in stand.stats()["bodies"] if b["messages"][-1]["content"] == "queued"
    }
    assert told == {("demo-v1", None), ("demo-v3", 1), ("demo-v1", 7), ("demo-v3", 7)}
    assert (
        sorted((e["slot"], e["latency_ms"] > 0, e["ttft_ms"]) for e in events if e["slot"] == "shadow")
        == [("shadow", False, None)] * 2
    )
    assert sorted((e["latency_ms"] > 0, e["ttft_ms"]) for e in events if e["slot"] == "champion") == [
        (False, None), (True, 2.0)
    ]  # fmt: skip


def test_a_client_that_goes_away_frees_its_slot(stand: Stand) -> None:
    for stream in (True, False):
        before = stand.stats()["cancelled"]
        body = {"model": "demo", "messages": [{"role": "user", "content": "slow"}], "stream": stream}
        with httpx.Client(trust_env=False) as http:
            if stream:
                with http.stream("POST", f"{stand.url}/v1/chat/completions", json=body, headers=stand.header()) as r:
                    next(r.iter_bytes())
            else:
                patience = httpx.Timeout(30, read=1.0)
                with pytest.raises(httpx.ReadTimeout):
                    http.post(f"{stand.url}/v1/chat/completions", json=body, headers=stand.header(), timeout=patience)
        wait_for(lambda before=before: stand.stats()["cancelled"] == before + 1)  # type: ignore[misc]
        assert stand.stats()["active"] == 0
    gone = [e for e in stand.wait_events(2) if e["status"] == 499]
    assert [e["stream"] for e in gone] == [True, False]
    assert 1 <= gone[0]["completion_tokens"] < 50, "what was sent counts"
    for event in gone:
        assert event["prompt_tokens"] == 1 + len("slow") // 4, "and what was asked, about"
        assert 0 < event["engine_seconds"] <= event["latency_ms"] / 1000 + 0.01
        assert event["cost_usd"] > 0


def test_an_engine_that_fails(stand: Stand) -> None:
    expected = {"garbage": 502, "fail": 502, "full": 429, "break": 200}
    for text, status in expected.items():
        answer = stand.ask(text=text, stream=text == "break")
        assert answer.status_code == status, text
        assert "error" in answer.text
        assert "[DONE]" not in answer.text
    assert stand.ask(text="full").headers["retry-after"] == "1"
    assert stand.engine is not None
    stand.engine.kill()
    stand.engine.wait()
    down = stand.ask()
    assert (down.status_code, down.json()["error"]["code"]) == (503, "unreachable")
    with stand.running_engine():  # a new process at the same address, without adapters
        assert stand.ask().json()["choices"][0]["message"]["content"].startswith("demo-v1")
    events = stand.wait_events(7)
    assert [e["status"] for e in events] == [502, 502, 429, 502, 429, 503, 200]
    assert {e["version"] for e in events} == {1}


def test_a_version_that_computes_nonsense_leaves_the_engine_to_the_others(stand: Stand) -> None:
    """Its streams break; the engine lives, and is not left alone for it."""
    for _ in range(6):
        with stand.http.stream("POST", f"{stand.url}/v1/chat/completions", headers=stand.header("service"),
                               json={"model": "demo", "messages": [{"role": "user", "content": "sick"}],
                                     "stream": True}) as answer:  # fmt: skip
            assert "failed" in "".join(answer.iter_text())
    assert stand.ask().status_code == 200
    metrics = stand.http.get(f"{stand.url}/metrics", headers=stand.header("viewer")).text
    assert not [
        line for line in metrics.splitlines() if line.startswith("tunesmith_upstream_open{") and line[-3:] != "0.0"
    ]


def test_tool_calls_come_back_as_they_were_made(stand: Stand) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    asked: Any = {"model": "demo", "messages": [{"role": "user", "content": "call"}], "tools": tools}
    with openai.OpenAI(base_url=f"{stand.url}/v1", api_key=stand.keys["service"], max_retries=0) as client:
        whole = client.chat.completions.create(**asked).choices[0]
        pieces = list(client.chat.completions.create(**asked, stream=True))
    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    [made] = whole.message.tool_calls
    assert (made.id, made.function.name, made.function.arguments) == ("call_1", "add", '{"a": 1}')
    said = [c for p in pieces for choice in p.choices for c in choice.delta.tool_calls or ()]
    assert "".join(c.function.arguments or "" for c in said if c.function) == '{"a": 1}'
    assert said[0].id == "call_1"
    assert any(body.get("tools") == tools for body in stand.stats()["bodies"])


def test_a_stream_that_ends_before_its_first_token_is_asked_again(stand: Stand) -> None:
    """Engines name who speaks before they have a token: of that alone a client has nothing."""
    for asked in (1, 3):
        answer = stand.ask(text="early", stream=True)
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant", None, None, None]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "demo-v1 word0 word1"
        assert "data: [DONE]" in answer.text
        assert stand.stats()["early"] == asked + 1
    assert {e["status"] for e in stand.wait_events(2)} == {200}


def test_what_who_answers_says_is_kept_only_where_text_is(stand: Stand) -> None:
    assert stand.ask(text="fail").status_code == 502
    with transaction() as conn:
        conn.execute("""update model set settings = '{"monitoring": {"keep_text": true}}' where name = 'demo'""")
    wait_for(lambda: stand.ask(text="fail").status_code == 502 and stand.events()[-1]["error"].endswith(": fail"))
    assert stand.events()[0]["error"] == "upstream: The engine failed with status 500"


def replicas() -> list[Any]:
    with transaction() as conn:
        return [row["id"] for row in conn.execute("select id from replica")]


def test_a_killed_gateway_loses_no_event(stand: Stand) -> None:
    """What was answered was recorded before the client had it, whenever the kill comes."""
    answered: list[str] = []

    def ask_on() -> None:
        with suppress(httpx.TransportError):
            while True:
                answer = stand.ask()
                assert answer.status_code == 200
                answered.append(answer.headers["x-request-id"])

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answered) >= 50, what="for answers")
    assert stand.gateway is not None
    stand.gateway.kill()
    stand.gateway.wait()
    for thread in threads:
        thread.join()
    with transaction() as conn:
        killed = conn.execute("update replica set seen_at = now() - interval '25 hours' returning id").fetchone()
    assert killed is not None
    with stand.running_gateway():
        stand.wait_ready()
        answered.append(stand.ask().headers["x-request-id"])
        wait_for(lambda: killed["id"] not in replicas() and replicas(), what="for the killed one to be forgotten")
        stand.wait_events(len(answered))
        time.sleep(0.5)
        events = [str(event["id"]) for event in stand.events()]
    assert set(answered) <= set(events)
    assert len(events) - len(answered) <= len(threads)  # of those that nobody got
    with transaction() as conn:
        row = conn.execute("select sum(rows)::int as told from event_batch").fetchone()
    assert row == {"told": len(events)}


def test_serving_goes_on_while_the_database_is_away(stand: Stand, server: Any) -> None:
    with transaction() as conn:
        pids = [
            r["pid"] for r in conn.execute("select pid from pg_stat_activity where backend_type = 'client backend'")
        ]
        postmaster = int(Path(f"/proc/{pids[0]}/stat").read_text().split()[3])
    assert stand.ask().status_code == 200
    stopped = [*pids, postmaster]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        until = time.monotonic() + 6
        count = 1
        while time.monotonic() < until:
            assert stand.ask().status_code == 200
            count += 1
        unknown = stand.http.get(f"{stand.url}/v1/models", headers={"authorization": "Bearer ts_x_y"})
        assert unknown.status_code == 503
        assert stand.http.get(f"{stand.url}/readyz").status_code == 200
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert len(stand.wait_events(count)) == count
    promote("demo", 2)
    wait_for(lambda: stand.ask().headers["x-tunesmith-version"] == "demo:2")


def test_too_many_at_once_are_turned_away(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway(concurrent=2):
        stand.wait_ready()
        threads = [threading.Thread(target=stand.ask, kwargs={"text": "slow"}) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: stand.stats()["active"] == 2)
        refused = stand.ask()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "busy"
        for thread in threads:
            thread.join()
        assert stand.ask().status_code == 200
        assert sorted(e["status"] for e in stand.wait_events(4)) == [200, 200, 200, 429]


def test_what_makes_way_leaves_places_for_others(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway(concurrent=4):
        stand.wait_ready()
        bulk = threading.Thread(target=stand.ask, kwargs={"text": "slow", "priority": 1})
        bulk.start()
        wait_for(lambda: stand.stats()["active"] == 1)
        refused = stand.ask(priority=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
        assert stand.ask().status_code == 200
        bulk.join()


def test_who_asks_again_as_soon_as_answered_is_never_turned_away(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway(concurrent=16):
        stand.wait_ready()
        asked = {"headers": stand.header("service"), "words": "demo-v1"}
        asked["body"] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
        load = [sys.executable, str(LOAD), "load", f"{stand.url}/v1/chat/completions", "3", "16", "0"]
        done = subprocess.run(load, input=json.dumps(asked), capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        assert found["answered"] > 100
        assert (found["refused"], found["failed"]) == (0, 0), found["why"]


def test_the_control_api(stand: Stand) -> None:
    base = f"{stand.url}/api/v1/models/demo"
    read = stand.http.get(f"{base}/deployment", headers=stand.header("viewer"))
    assert read.headers["etag"] == '"1"'
    assert read.json()["champion"] == 1

    def patch(body: dict[str, Any], match: str | None, role: str = "operator") -> httpx.Response:
        headers = stand.header(role) | ({"if-match": match} if match else {})
        return stand.http.patch(f"{base}/deployment", json=body, headers=headers)

    assert patch({"champion": 2, "reason": "x"}, None).status_code == 428
    assert patch({"champion": 2, "reason": "x"}, '"0"').status_code == 412
    assert patch({"champion": 2, "reason": "x"}, '"1"').status_code == 409, "never judged by a gate"
    assert patch({"champion": 2, "reason": "x", "force": True}, '"1"').status_code == 403
    done = patch({"champion": 2, "reason": "x", "force": True}, '"1"', "admin")
    assert (done.status_code, done.headers["etag"]) == (200, '"2"')
    assert patch({"challenger": 3, "challenger_share": 0.1, "reason": "try"}, "2").status_code == 200
    assert patch({"challenger": None, "reason": "enough"}, "3").json()["challenger"] is None
    for wrong in ({"reason": "x"}, {"champion": None, "reason": "x"}, {"champion": 1}, {"champion": 1, "shadow": 2},
                  {"champion": "1; drop table", "reason": "x"}, {"champion": 1, "reason": "x", "more": 1}):  # fmt: skip
        answer = patch(wrong, "4")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "usage"), wrong
    back = stand.http.post(f"{base}/rollback", json={"reason": "worse"}, headers=stand.header("operator"))
    assert back.json()["champion"] == 1
    entries = stand.http.get(f"{base}/history", headers=stand.header("viewer")).json()["entries"]
    assert [e["action"] for e in entries] == ["promote", "promote", "canary", "stop", "rollback"]
    assert entries[1]["forced"]
    assert "the admin" in entries[1]["actor"]
    assert entries[1]["at"].endswith("Z")
    listed = stand.http.get(f"{base}/versions", headers=stand.header("viewer")).json()["versions"]
    assert [(v["version"], v["serving"]) for v in listed] == [(1, "champion"), (2, None), (3, None)]
    hostile = stand.http.get(f"{stand.url}/api/v1/models/%E2%80%AEx/versions", headers=stand.header("viewer"))
    assert hostile.status_code == 400
    docs = stand.http.get(f"{stand.url}/api/v1/docs", headers=stand.header("viewer"))
    assert "PATCH /api/v1/models/{model}/deployment" in docs.text
    assert "http" not in docs.text.replace("http-equiv", "")
    schema = stand.http.get(f"{stand.url}/api/v1/openapi.json", headers=stand.header("viewer")).json()
    assert "/models/{model}/promote" in schema["paths"]


def test_text_is_kept_only_where_the_model_says_so_and_redacted(stand: Stand) -> None:
    secret = "write to ann@example.com\0 please"
    stand.ask(text=secret)
    price = {"per_1k_prompt_tokens_usd": 1.0, "per_1k_completion_tokens_usd": 2.0}
    with transaction() as conn:
        conn.execute("update model set settings = %s", (Jsonb({"monitoring": {"keep_text": True, "price": price}}),))
    time.sleep(2.5)
    stand.ask(text=secret)
    before, after = stand.wait_events(2)
    assert (before["messages"], before["answer"]) == (None, None)
    assert after["messages"] == [{"role": "user", "content": "write to [EMAIL]\ufffd please"}]
    assert after["answer"] == "demo-v1 word0 word1"
    assert after["cost_usd"] == pytest.approx((5 * 1.0 + 3 * 2.0) / 1000)
    assert "ann@" not in (stand.home / "gateway.log").read_text()


def test_a_stopped_gateway_leaves_nothing_behind(stand: Stand) -> None:
    for _ in range(20):
        stand.ask()
    assert stand.gateway is not None
    stand.gateway.terminate()
    stand.gateway.wait(60)
    assert len(stand.events()) == 20
    assert not list((stand.home / "spool").iterdir())
