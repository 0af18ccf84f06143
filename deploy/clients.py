"""How long a client may keep its connection waiting: until it has asked, and until it takes what it is sent.

uvicorn waits for both for ever, and each such client would keep a socket.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0  # from the connection, or a request's first byte, to the end of its headers
TAKE_SECONDS = 60.0  # in which a client takes something, while more waits than its connection holds


class Impatient(HttpToolsProtocol):
    """uvicorn's protocol, that ends such connections."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._head: asyncio.TimerHandle | None = None
        self._take: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def on_message_begin(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head = _ended(self._head)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._take is None:
            self._take = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._take = _ended(self._take)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._take = _ended(self._head), _ended(self._take)
        super().connection_lost(exc)


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
