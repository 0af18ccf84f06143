"""An OpenAI-shaped server whose answers a test decides, for what a real model cannot be asked for.

`answer` gets a request's body and returns the text of the answer, or (status, headers, JSON) for anything else; it may
sleep. The server keeps what it saw.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, dict[str, str], Any]


class Peer:
    def __init__(self, answer: Callable[[dict[str, Any]], Answer], model: str | None) -> None:
        self.answer, self.model = answer, model
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str | None] = set()
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer], model: str | None = None) -> Iterator[Peer]:
    """A server; its answers report `model`, or the name that was asked for. Of usage they count the words."""
    peer = Peer(answer, model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with peer.lock:
                peer.bodies.append(body)
                peer.times.append(time.monotonic())
                peer.keys.add(self.headers.get("authorization"))
                peer.active += 1
                peer.most_active = max(peer.most_active, peer.active)
            try:
                said = peer.answer(body)
            finally:
                with peer.lock:
                    peer.active -= 1
            status, headers, value = said if isinstance(said, tuple) else (200, {}, self._completion(body, said))
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)

        def _completion(self, body: dict[str, Any], text: str) -> dict[str, Any]:
            asked = sum(len(message["content"].split()) for message in body["messages"])
            return {
                "id": "x",
                "model": peer.model or body["model"],
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": asked, "completion_tokens": len(text.split())},
            }

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # a client that did not wait
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    peer.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield peer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
