"""The other end of the gateway's benchmark: a model server without a delay, and the load.

    python gateway_peer.py serve PORT
    python gateway_peer.py load URL SECONDS CONNECTIONS RATE < {"headers": {...}, "body": {...}, "words": "..."}

Both are asyncio protocols on uvloop that parse no more of HTTP than they must, so that what is measured is the server
in between. The load is closed (a connection asks again as soon as it is answered) where RATE is 0, else open: requests
begin at RATE a second, whatever became of those before, and their time counts from when they were due. It prints JSON:
{"answered", "refused", "failed", "seconds", "milliseconds": [...], "why"}; an answer is one with status 200 that says
the words (`WORDS`, if none are given), a refusal one with 429.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import uvloop

WORDS = "Order status."
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "demo",
        "choices": [
            {"index": 0, "finish_reason": "stop", "logprobs": None, "message": {"role": "assistant", "content": WORDS}}
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23},
    }
).encode()
REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)


def whole(data: bytes) -> tuple[bytes, bytes, int] | None:
    """Head, body and size of the first message in `data`, once it is all there; of a chunked one the raw body."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    at = head.find(b"content-length:")
    if at >= 0:
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        size = end + 4 + length
    elif b"chunked" in head:
        last = data.find(b"\r\n0\r\n\r\n", end)
        size = last + 7 if last >= 0 else sys.maxsize
    else:
        size = end + 4
    return (head, data[end + 4 : size], size) if len(data) >= size else None


class Model(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (message := whole(self.data)) is not None:
            self.data = self.data[message[2] :]
            self.transport.write(REPLY)


class Client(asyncio.Protocol):
    """One connection; `due` is when the request on its way should have begun."""

    def __init__(self, load: Load) -> None:
        self.load, self.data, self.due = load, b"", 0.0
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.load.free(self)

    def ask(self, due: float) -> None:
        self.due = due
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        message = whole(self.data)
        if message is None:
            return
        head, body, _ = message
        self.data = b""
        ok = head.startswith(b"http/1.1 200") and self.load.words in body
        self.load.refused += head.startswith(b"http/1.1 429")
        self.load.done(ok, time.perf_counter() - self.due, None if ok else head + b"\n" + body)
        self.due = 0.0
        if b"connection: close" not in head:
            self.load.free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.due:
            self.load.done(False, 0.0, b"the connection was closed")
        self.load.lost()


class Load:
    def __init__(self, url: str, asked: dict[str, Any], seconds: float, connections: int, rate: float) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        body = json.dumps(asked["body"]).encode()
        lines = [f"POST {parts.path} HTTP/1.1", f"host: {parts.netloc}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in asked["headers"].items()] + [f"content-length: {len(body)}"]
        self.request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self.seconds, self.connections, self.rate = seconds, connections, rate
        self.times: list[float] = []
        self.words = asked.get("words", WORDS).encode()
        self.refused = self.failed = 0
        self.why = b""
        self.idle: deque[Client] = deque()
        self.waiting: deque[float] = deque()
        self.until = 0.0
        self.begun = self.ended = 0

    def free(self, client: Client) -> None:
        if self.waiting:
            client.ask(self.waiting.popleft())
        elif self.until and not self.rate and time.perf_counter() < self.until:
            self.begun += 1
            client.ask(time.perf_counter())
        else:
            self.idle.append(client)

    def done(self, ok: bool, seconds: float, why: bytes | None) -> None:
        self.ended += 1
        if ok:
            self.times.append(seconds)
        else:
            self.failed += 1
            self.why = why or self.why

    def lost(self) -> None:
        if self.until and time.perf_counter() < self.until:
            asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: Client(self), self.host, self.port)

    async def run(self) -> dict[str, Any]:
        for _ in range(self.connections):
            await self._connect()
        begun = time.perf_counter()
        self.until = begun + self.seconds
        if not self.rate:
            for client in list(self.idle):
                self.idle.popleft()
                self.free(client)
            await asyncio.sleep(self.seconds)
        else:
            for number in range(int(self.rate * self.seconds)):
                due = begun + number / self.rate
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                self.begun += 1
                if self.idle:
                    self.idle.popleft().ask(due)
                else:
                    self.waiting.append(due)
        taken = time.perf_counter() - begun
        for _ in range(600):  # what is on its way
            if self.ended >= self.begun:
                break
            await asyncio.sleep(0.05)
        return {
            "answered": len(self.times),
            "refused": self.refused,
            "failed": self.failed - self.refused + self.begun - self.ended,
            "seconds": taken,
            "milliseconds": [1000 * t for t in self.times],
            "why": self.why[-500:].decode("utf-8", "replace"),
        }


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    if sys.argv[1] == "serve":
        uvloop.run(serve(int(sys.argv[2])))
        return
    url, seconds, connections, rate = sys.argv[2:]
    load = Load(url, json.load(sys.stdin), float(seconds), int(connections), float(rate))
    print(json.dumps(uvloop.run(load.run())))


if __name__ == "__main__":
    main()
