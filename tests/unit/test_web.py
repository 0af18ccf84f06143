"""What answers at an address may be anything; the supervisor outlives it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from infra import web

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """The address of a server that says `data` to everybody and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = server.accept()
                    with caller:
                        heard = caller.recv(65536)
                        while not heard.endswith(b"{}" if heard.startswith(b"POST") else b"\r\n\r\n"):
                            heard += caller.recv(65536)
                        caller.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200,
        JSON + b"content-length: 99\r\n\r\n{}",
        JSON + b"content-length: 5\r\n\r\n<htm>",
        JSON + b"content-length: 1\r\n\r\n\xff",
    ],
)
def test_what_cannot_be_read_is_an_oserror(data: bytes) -> None:
    with answering(data) as url, pytest.raises(OSError, match="no answer that can be read"):
        web.post(url, {})


def test_what_speaks_no_http_does_not_answer() -> None:
    with answering(b"SSH-2.0-OpenSSH_9.6\r\n") as url:
        assert not web.answers(url)
    with answering(JSON + b"content-length: 2\r\n\r\n{}") as url:
        assert web.answers(url)
        assert web.post(url, {}) == {}
