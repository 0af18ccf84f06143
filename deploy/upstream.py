"""How the gateway speaks to engines: vLLM's HTTP contract over one pool of connections.

A request that has not answered anything yet is tried again, on the next engine where there is one, at most
`ATTEMPTS` times; after its first token it is not, since the client has that token.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

import aiohttp
import orjson

from deploy.routing import Served
from infra.errors import TunesmithError, Unreachable, UsageError

ATTEMPTS = 3
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 600.0  # for a whole answer
SILENCE_SECONDS = 120.0  # between two pieces of one


class BadAnswer(TunesmithError):
    """An engine died in the middle of an answer, or what it said is not an answer."""

    http_status: ClassVar[int] = 502
    code: ClassVar[str] = "upstream"


class Busy(TunesmithError):
    """No place for another request right now."""

    http_status: ClassVar[int] = 429
    code: ClassVar[str] = "busy"


class _TryAgain(Exception):
    """This attempt failed in a way that another may not; the cause says how."""


class Upstream:
    """The gateway's client of engines; belongs to one event loop. `open` it, `close` it."""

    def __init__(self, secret: str | None) -> None:
        self._headers = {"authorization": f"Bearer {secret}"} if secret else {}
        self._turn = itertools.count()
        self._http: aiohttp.ClientSession | None = None
        self.retries = 0

    async def open(self) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS),
            headers={**self._headers, "content-type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # engines are private; requests to them never go through a proxy
            read_bufsize=2**20,
        )

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()

    # ------------------------------------------------------------ answers

    async def complete(self, engines: Sequence[str], served: Served, path: str, body: Mapping[str, Any]) -> Any:
        """The whole answer, as the engine's JSON object. Raises as `stream` does."""
        answers = [answer async for answer in self._attempts(engines, served, path, body, stream=False)]
        return answers[0]

    def stream(
        self, engines: Sequence[str], served: Served, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's chunks; use it in `contextlib.aclosing`: closing it closes the connection, by which the
        engine frees the slot.

        Raises Unreachable (no engine), Busy, UsageError (the engine refuses the request), BadAnswer; after the
        first chunk only BadAnswer.
        """
        return self._attempts(engines, served, path, body, stream=True)

    async def _attempts(
        self, engines: Sequence[str], served: Served, path: str, body: Mapping[str, Any], *, stream: bool
    ) -> AsyncGenerator[Any, None]:
        if not engines:
            raise Unreachable(
                f"No engine runs for the base of {served.name}.", hint="`tunesmith status` shows the engines."
            )
        data = orjson.dumps({**body, "model": served.adapter})
        first = next(self._turn)
        cause: BaseException | None = None
        for attempt in range(ATTEMPTS):
            engine = engines[(first + attempt) % len(engines)]
            begun = False
            try:
                async with aclosing(self._attempt(engine, served, path, data, stream=stream)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except (_TryAgain, aiohttp.ClientError, OSError, TimeoutError) as error:
                cause = error.__cause__ if isinstance(error, _TryAgain) and error.__cause__ else error
                if begun:
                    raise BadAnswer("The engine broke off in the middle of an answer.") from cause
            self.retries += 1
            await asyncio.sleep(random.uniform(0.02, 0.1) * (attempt + 1))
        if isinstance(cause, TunesmithError):
            raise cause
        raise Unreachable(
            f"The engine of {served.name} does not answer.", hint="Try again; `tunesmith status` shows the engines."
        ) from cause

    async def _attempt(
        self, engine: str, served: Served, path: str, data: bytes, *, stream: bool
    ) -> AsyncGenerator[Any, None]:
        async with self._post(engine, path, data) as response:
            if response.status != 200:
                await self._explain(engine, served, response)
            if not stream:
                yield _object(await response.read())
                return
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    return
                chunk = _object(text)
                if "error" in chunk:
                    raise BadAnswer(f"The engine failed: {_said(chunk)}")
                yield chunk
            raise aiohttp.ClientPayloadError("the stream ended early")

    async def _explain(self, engine: str, served: Served, response: aiohttp.ClientResponse) -> None:
        """Raise what a refusal of the engine means here."""
        try:
            said = _said(orjson.loads(await response.read()))
        except orjson.JSONDecodeError:
            said = f"status {response.status}"
        if response.status == 404 and served.adapter_path is not None:
            # The engine was restarted, or let go of the adapter to make room.
            await self.load(engine, served)
            raise _TryAgain
        if response.status in (429, 503):
            raise _TryAgain from Busy(f"The engine is full: {said}", hint="Try again in a second.")
        if response.status in (400, 413, 422):
            raise UsageError(said)
        raise _TryAgain from BadAnswer(f"The engine failed: {said}")

    # ------------------------------------------------------------ adapters

    async def load(self, engine: str, served: Served) -> None:
        """Make an engine hold a version's adapter; one that is there already stays. Raises BadAnswer, Unreachable."""
        if served.adapter_path is None:
            return
        data = orjson.dumps({"lora_name": served.adapter, "lora_path": served.adapter_path})
        status, said = await self._tell(engine, "/v1/load_lora_adapter", data)
        if status != 200 and not (status == 400 and "already been loaded" in said):  # vLLM's words
            raise BadAnswer(f"The engine does not take {served.name}: {said}")

    async def unload(self, engine: str, adapter: str) -> None:
        """Make an engine let go of an adapter; one that is not there is no error. Raises Unreachable."""
        await self._tell(engine, "/v1/unload_lora_adapter", orjson.dumps({"lora_name": adapter}))

    async def try_out(self, engine: str, served: Served) -> None:
        """One short request to a version; returns when it answered. Raises BadAnswer, Busy, Unreachable."""
        body = {"model": served.adapter, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        status, said = await self._tell(engine, "/v1/chat/completions", orjson.dumps({**body, "temperature": 0}))
        if status in (429, 503):
            raise Busy(f"The engine is full: {said}")
        if status != 200:
            raise BadAnswer(f"{served.name} fails its first request: {said}")

    async def _tell(self, engine: str, path: str, data: bytes) -> tuple[int, str]:
        try:
            async with self._post(engine, path, data) as response:
                text = await response.text()
                if response.status == 200:
                    return 200, text
                try:
                    return response.status, _said(orjson.loads(text))
                except orjson.JSONDecodeError:
                    return response.status, text[:200]
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"The engine at {engine} does not answer: {error}") from error

    def _post(self, engine: str, path: str, data: bytes) -> Any:
        if self._http is None:
            raise RuntimeError("Upstream is not open")
        return self._http.post(engine + path, data=data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadAnswer("The engine did not answer in JSON.") from error
    if not isinstance(value, dict):
        raise BadAnswer("The engine did not answer with an object.")
    return value


def _said(answer: Any) -> str:
    """The message inside an error object of OpenAI's or FastAPI's shape."""
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if message:
            return str(message)[:500]
    return "no reason given"
