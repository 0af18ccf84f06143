"""Log-in by cookie, and what a foreign page cannot do with it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uuid_utils.compat import uuid7

from deploy.auth import (
    Auth,
    Guard,
    NotAllowed,
    NotAuthenticated,
    clear_session,
    create_key,
    identify,
    needs,
    revoke_key,
    set_session,
)
from deploy.errors import explain
from infra.db import transaction
from infra.errors import TunesmithError, UsageError
from infra.settings import Settings
from monitoring import events
from monitoring.routes import routes as monitoring_routes

HERE = "http://tunesmith.test"


def make_app(auth: Auth) -> Guard:
    async def login(request: Request) -> Response:
        response = PlainTextResponse("in")
        set_session(response, await auth.login((await request.body()).decode()), request)
        return response

    async def logout(request: Request) -> Response:
        await auth.logout(request)
        response = PlainTextResponse("out")
        clear_session(response)
        return response

    @needs("operator")
    async def act(request: Request) -> Response:
        who = identify(request)
        assert who is not None
        return PlainTextResponse(who.actor)

    routes = [
        Route("/login", login, methods=["POST"]),
        Route("/logout", logout, methods=["POST"]),
        Route("/act", act, methods=["GET", "POST"]),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={TunesmithError: explain}), auth)


async def test_sessions(database: Settings) -> None:
    with transaction() as conn:
        operator = create_key(conn, name="Ann", role="operator")
        viewer = create_key(conn, name="Vic", role="viewer")
        service = create_key(conn, name="app", role="service")
    auth = Auth()
    transport = httpx.ASGITransport(make_app(auth))
    async with httpx.AsyncClient(transport=transport, base_url=HERE) as http:
        ours = {"origin": HERE}
        assert (await http.post("/login", content=operator.key)).status_code == 403, "no browser of ours"
        assert (await http.post("/login", content=operator.key, headers={"origin": "http://evil"})).status_code == 403
        assert (await http.post("/login", content="ts_x_y", headers=ours)).status_code == 401
        assert (await http.post("/login", content=service.key, headers=ours)).status_code == 403
        done = await http.post("/login", content=operator.key + "\n", headers={"sec-fetch-site": "same-origin"})
        cookie = done.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert operator.key.split("_")[2] not in cookie
        assert (await http.get("/act")).text == f"key:{operator.id} (Ann)"
        foreign: list[dict[str, str]] = [
            {"origin": "http://evil"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}, {},
            {"sec-fetch-site": "same-site"}, {"origin": HERE + ".evil.com"},
            {"origin": HERE, "sec-fetch-site": "cross-site"},
        ]  # fmt: skip
        for headers in foreign:
            assert (await http.post("/act", headers=headers)).status_code == 403, headers
        assert (await http.post("/act", headers=ours)).status_code == 200
        bearer = {"authorization": f"Bearer {viewer.key}"}
        assert (await http.post("/act", headers=bearer)).status_code == 403, "the key goes before the cookie"
        assert (await http.post("/logout", headers=ours)).status_code == 200
        http.cookies.set("tunesmith_session", cookie.split("=")[1].split(";")[0])
        assert (await http.get("/act")).status_code == 401, "the session ended, not only the cookie"
    session = await auth.login(operator.key)
    assert await auth.authenticate(None, session.token) is not None
    with transaction() as conn:
        revoke_key(conn, operator.id)
    await auth._refresh()
    assert await auth.authenticate(None, session.token) is None
    with pytest.raises(NotAuthenticated):
        await auth.login(operator.key)
    with pytest.raises(NotAllowed):
        await auth.login(service.key)
    with transaction() as conn:
        kept = conn.execute("select hash from api_key union all select hash from session").fetchall()
    assert all(len(row["hash"]) == 32 for row in kept)


async def test_keys_are_read_again_after_a_database_that_refused(database: Settings) -> None:
    """Whatever it refuses, such as a table that a repair took away for a moment, the copy goes on being refreshed."""
    with transaction() as conn:
        old = create_key(conn, name="Ann", role="operator")
    auth = Auth()
    reader = asyncio.create_task(auth.run())
    try:
        assert await auth.authenticate(f"Bearer {old.key}", None) is not None
        with transaction() as conn:
            conn.execute("alter table session rename to away")
        await asyncio.sleep(2.5)
        assert not reader.done()
        assert await auth.authenticate(f"Bearer {old.key}", None) is not None
        with transaction() as conn:
            conn.execute("alter table away rename to session")
            new = create_key(conn, name="Bob", role="viewer")
        until = time.monotonic() + 60
        while new.id not in auth._copy.keys:  # nobody asks for it: `run` alone reads
            assert time.monotonic() < until
            await asyncio.sleep(0.1)
    finally:
        reader.cancel()


async def test_readers_that_wait_for_one_another_all_get_an_answer(database: Settings) -> None:
    """One may begin the next reading before another has taken the result of the last."""
    auth = Auth()
    until = time.monotonic() + 3

    async def stranger() -> None:
        while time.monotonic() < until:
            assert await auth.authenticate("Bearer ts_x_y", None) is None

    async def reader() -> None:
        while time.monotonic() < until:
            before = time.monotonic()
            await auth._refresh()
            assert auth._copy.read_at >= before
            await asyncio.sleep(0.001)

    await asyncio.gather(*(stranger() for _ in range(50)), *(reader() for _ in range(2)))


async def test_a_large_batch_of_events_does_not_stop_the_loop(database: Settings) -> None:
    with transaction() as conn:
        key = create_key(conn, name="gateway", role="operator").key
    messages = [{"role": "user", "content": "x"}] * 1000
    line = {"id": str(uuid7()), "model": "m", "version": 1, "status": 200, "latency_ms": 1.0, "messages": messages}
    body = b"\n".join([orjson.dumps(line)] * 400 + [b"{"])  # and refused, so that only reading it takes long
    begun = time.perf_counter()
    with pytest.raises(UsageError):
        events.parse(body)
    alone = time.perf_counter() - begun
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)

    auth = Auth()
    app = Guard(Starlette(routes=monitoring_routes(), exception_handlers={TunesmithError: explain}), auth)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as http:
        header = {"authorization": f"Bearer {key}"}
        assert (await http.post("/v1/events", content=b"", headers=header)).status_code == 200  # the key is known now
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)  # it has begun
        answer = await http.post("/v1/events", content=body, headers=header)
        await asyncio.sleep(0.01)  # the last gap ends
        ticking.cancel()
    assert answer.status_code == 400
    assert max(gaps) < alone / 2


def test_the_keys_command(database: Settings) -> None:
    program = "import sys; from pipelines.cli import main; sys.argv[0] = 'tunesmith'; main()"

    def tunesmith(*words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        return done.returncode, done.stdout

    code, text = tunesmith("keys", "create", "--role", "operator", "--name", "[red]Ann\x1b[0m", "--json")
    assert (code, json.loads(text)["error"]["code"]) == (2, "usage")
    code, text = tunesmith("keys", "create", "--role", "operator", "--name", "[red]Ann", "--json")
    made = json.loads(text)
    assert (code, sorted(made)) == (0, ["id", "key", "name", "role"])
    code, text = tunesmith("keys", "list")
    assert "[red]Ann" in text
    assert made["key"] not in text
    assert tunesmith("keys", "revoke", made["id"])[0] == 0
    assert tunesmith("keys", "revoke", "nobody")[0] == 5
    assert json.loads(tunesmith("keys", "list", "--json")[1])["keys"][0]["revoked_at"]
