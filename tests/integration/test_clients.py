"""Clients that dawdle: over their request's head, and over what they are sent."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack, suppress

import psutil
from serving import add_version, make_stand, promote, wait_for

from infra.settings import Settings


def test_clients_that_dawdle_keep_no_socket(database: Settings) -> None:
    add_version("demo", 1)
    promote("demo", 1)
    with (
        make_stand(database.home) as stand,
        stand.running_engine(),
        stand.running_gateway(client_seconds=(12.0, 6.0)),
        ExitStack() as sockets,
    ):
        stand.wait_ready()
        assert stand.gateway is not None
        gateway, port = psutil.Process(stand.gateway.pid), int(stand.url.rsplit(":", 1)[1])
        head = "".join(f"{name}: {value}\r\n" for name, value in (stand.header() | {"host": "x"}).items())
        body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "flood"}]})
        asked = f"POST /v1/chat/completions HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n{body}"
        silent, slow, again, blank, deaf = (
            sockets.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(5)
        )
        slow.sendall(asked[:40].encode())
        for client, rest in ((again, b"GET /heal"), (blank, b"\r\n")):
            client.sendall(f"GET /healthz HTTP/1.1\r\n{head}\r\n".encode())
            answer = b""
            while b"}" not in answer:
                part = client.recv(4096)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            client.sendall(rest)
        deaf.sendall(asked.encode())  # 20 MB, of which it takes nothing
        ours = {each.getsockname()[1] for each in (silent, slow, again, blank, deaf)}

        def held() -> set[int]:
            return ours & {each.raddr.port for each in gateway.net_connections("tcp") if each.raddr}

        assert held() == ours
        wait_for(lambda: not held(), what="for the gateway to let them go")
        for each in (silent, slow, again, blank):
            with suppress(ConnectionResetError):
                assert each.recv(1) == b""
        assert stand.ask().status_code == 200

        with socket.create_connection(("127.0.0.1", port), timeout=60) as unhurried:
            unhurried.sendall(asked.encode())
            taken, until = 0, time.monotonic() + 9
            while part := unhurried.recv(2**17):
                taken += len(part)
                if taken > 20_000_000:
                    break
                if time.monotonic() < until:
                    time.sleep(0.1)
        assert taken > 20_000_000, "whoever takes something is waited for"
