"""What no route takes, refused in one place: bodies over their limit, and NUL, which PostgreSQL cannot hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.errors import explain
from infra.errors import TunesmithError, UsageError

BODY_BYTES = 2**20
UPLOAD_BYTES = 2**31  # an import's adapter and what comes with it
_IMPORT = re.compile(r"/api/v1/models/[^/]+/versions")
OTHERS: Mapping[str, int | None] = {
    "/v1/events": 16_000_000,  # batches
    "/v1/chat/completions": None,  # inference looks itself, since it records what it refuses
    "/v1/completions": None,
}


class TooLarge(UsageError):
    """A body that is larger than its route takes."""

    http_status: ClassVar[int] = 413
    code: ClassVar[str] = "too_large"


class Bounds:
    """ASGI middleware behind the guard. A body that is announced as too large is refused unread; of one that is not
    announced, no more is read than the limit: the route that reads on gets TooLarge."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            await _refuse(UsageError("The address holds a NUL character (%00)."), scope, receive, send)
            return
        usual = UPLOAD_BYTES if _IMPORT.fullmatch(scope["path"]) else BODY_BYTES
        limit = OTHERS.get(scope["path"], usual)
        if limit is None:
            await self.app(scope, receive, send)
            return
        too_large = TooLarge(f"The body is larger than {limit:,} bytes.", hint="Send less at a time.")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            await _refuse(too_large, scope, receive, send)
            return
        size = 0

        async def receive_within() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise too_large
            return message

        async def send_last(message: Message) -> None:
            if size > limit and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive_within, send_last)


async def _refuse(error: TunesmithError, scope: Scope, receive: Receive, send: Send) -> None:
    response = await explain(Request(scope), error)
    response.headers["connection"] = "close"  # the body was not read
    await response(scope, receive, send)
