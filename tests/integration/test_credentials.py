"""The team's own Prefect and MLflow may want credentials: what we send is what their own clients send."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from infra import prefect
from infra.errors import NotFound, Unreachable, UsageError
from infra.settings import get_settings
from registry import aliases

BASIC = f"Basic {base64.b64encode(b'me:pass').decode()}"


class Server(ThreadingHTTPServer):
    """Answers every call with `status` and `answer`, and remembers how it was signed."""

    def __init__(self) -> None:
        self.signed: list[str | None] = []
        self.status, self.answer = 200, b"{}"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.signed.append(self.headers["authorization"])
                self.send_response(server.status)
                self.send_header("content-length", str(len(server.answer)))
                self.end_headers()
                self.wfile.write(server.answer)

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"{server.url}/api")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        get_settings.cache_clear()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("given", "signed"),
    [
        ({}, None),
        ({"PREFECT_API_KEY": "pnu_1"}, "Bearer pnu_1"),
        ({"PREFECT_API_AUTH_STRING": "me:pass", "PREFECT_API_KEY": "pnu_1"}, BASIC),
    ],
)
def test_prefect_is_asked_with_its_credentials(
    server: Server, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], signed: str | None
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    server.answer = b'{"a": 1}'
    assert prefect.call("GET", "/health") == {"a": 1}
    assert server.signed == [signed]


def test_what_prefect_refuses_is_told_in_its_words(server: Server) -> None:
    server.answer = b'{"detail": "no, <because>"}'
    for status, kind, says in (
        (404, NotFound, "Prefect knows no flows/x"),
        (422, UsageError, "no, <because>"),
        (503, Unreachable, "Prefect answered 503 to /flows/x"),
    ):
        server.status = status
        with pytest.raises(kind, match=says):
            prefect.call("GET", "/flows/x")
    server.status = 401
    with pytest.raises(UsageError) as refused:
        prefect.call("GET", "/flows/x")
    assert "PREFECT_API_KEY" in refused.value.hint
    server.status, server.answer = 200, b"<html>"
    with pytest.raises(Unreachable):
        prefect.call("GET", "/flows/x")
    server.status, server.answer = 204, b""
    assert prefect.call("GET", "/flows/x") is None


@pytest.mark.parametrize(
    ("given", "signed"),
    [
        ({}, None),
        ({"TOKEN": "t"}, "Bearer t"),
        ({"USERNAME": "me", "PASSWORD": "pass", "TOKEN": "t"}, BASIC),
    ],
)
def test_mlflow_is_told_aliases_with_its_credentials(
    server: Server, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], signed: str | None
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    server.answer = json.dumps({"registered_model": {"name": "m"}}).encode()
    assert aliases.set_aliases("m", {"champion": None}) == []
    assert server.signed == [signed]
