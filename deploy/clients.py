"""How long a client may keep its connection waiting: until it has asked, and until it takes what it is sent.

uvicorn waits for both for ever, and each such client would keep a socket.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0  # from the connection, or from what comes after an answer, to the end of a request's headers
TAKE_SECONDS = 60.0  # in which a client takes something of what waits for it
_LOOKS = 6  # in the shorter of both


class Impatient(HttpToolsProtocol):
    """uvicorn's protocol, that ends such connections. It looks at each of them every few seconds, since not every byte
    that comes begins a request, nor does every one that is taken make room for more."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._look_again: asyncio.TimerHandle | None = None
        self._asking_since: float | None = None
        self._left = self._left_since = 0.0  # bytes that wait for the client, and since when no fewer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asking_since = self.loop.time()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        now, waits = self.loop.time(), self.transport.get_write_buffer_size()
        answered = self.cycle is None or self.cycle.response_complete
        if not answered or self.timeout_keep_alive_task is not None:  # which ends an idle connection
            self._asking_since = None
        elif self._asking_since is None:
            self._asking_since = now
        if not waits or waits < self._left or not (answered or self.flow.write_paused):  # else nothing is added to it
            self._left, self._left_since = waits, now
        self._left = waits
        if (self._asking_since is not None and now - self._asking_since > HEAD_SECONDS) or (
            now - self._left_since > TAKE_SECONDS
        ):
            self.transport.abort()
            return
        self._look_again = self.loop.call_later(min(HEAD_SECONDS, TAKE_SECONDS) / _LOOKS, self._look)
