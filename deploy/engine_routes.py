"""The engine over HTTP: vLLM's contract, streams, refusals in OpenAI's shape, and figures for Prometheus."""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import orjson
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy import chat
from deploy.auth import NotAuthenticated, error_json
from deploy.decoding import Row
from deploy.engine import BASE_NAME, Broken, Engine, Limits
from deploy.scheduler import Piece, Ticket
from infra.errors import NotFound, TunesmithError, UsageError

log = logging.getLogger(__name__)

BEAT_SECONDS = 3.0


class TooLarge(UsageError):
    """A body above the bound, not read."""

    http_status: ClassVar[int] = 413
    code: ClassVar[str] = "request_too_large"


def create_app(engine: Engine, secret: str, *, beat: Callable[[], None] | None = None) -> ASGIApp:
    """The engine's routes; all but ``/health`` want ``Authorization: Bearer <secret>``. `beat` is called every three
    seconds, in a thread."""
    registry, count = _metrics(engine)

    async def chat_completions(request: HTTPRequest) -> Response:
        return await _answer(engine, request, chat.parse(chat.ChatAsk, await _body(request, engine.limits)))

    async def completions(request: HTTPRequest) -> Response:
        return await _answer(engine, request, chat.parse(chat.CompletionAsk, await _body(request, engine.limits)))

    async def models(request: HTTPRequest) -> Response:
        card = {"object": "model", "created": engine.created, "owned_by": "tunesmith", "max_model_len": engine.context}
        data = [card | {"id": BASE_NAME, "root": str(engine.folder), "parent": None}]
        for name in engine.adapters.names():
            if adapter := engine.adapters.get(name):
                data.append(card | {"id": name, "root": str(adapter.folder), "parent": BASE_NAME})
        return _json({"object": "list", "data": data})

    async def load(request: HTTPRequest) -> Response:
        ask = chat.parse(chat.LoadAsk, await _body(request, engine.limits))
        if ask.lora_name == BASE_NAME:
            raise chat.BadRequest(f"{BASE_NAME!r} is the base's own name.", details={"param": "lora_name"})
        adapter = await asyncio.to_thread(engine.adapters.read, Path(ask.lora_path), ask.digests)
        await engine.scheduler.call(lambda: engine.adapters.add(ask.lora_name, adapter))
        log.info("adapter %s loaded, rank %d", ask.lora_name, adapter.rank)
        return PlainTextResponse(f"Success: LoRA adapter '{ask.lora_name}' added successfully.")

    async def unload(request: HTTPRequest) -> Response:
        ask = chat.parse(chat.UnloadAsk, await _body(request, engine.limits))
        if not await engine.scheduler.call(lambda: engine.adapters.remove(ask.lora_name)):
            raise NotFound(f"The adapter {ask.lora_name[:100]!r} is not loaded.")
        return PlainTextResponse(f"Success: LoRA adapter '{ask.lora_name}' removed successfully.")

    async def health(request: HTTPRequest) -> Response:
        return Response(status_code=200 if engine.scheduler.is_alive() else 503)

    async def metrics(request: HTTPRequest) -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.scheduler.finished.append(count)
        beating = asyncio.create_task(_beat(beat)) if beat else None
        yield
        if beating is not None:
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/load_lora_adapter", load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={TunesmithError: _refuse, Exception: _refuse, 404: _unknown, 405: _unknown},
        lifespan=lifespan,
    )
    return _Guard(app, secret)


class _Guard:
    """Lets nobody in without the secret, but for the health route."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app, self._expected = app, f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = NotAuthenticated("The engine secret is missing or wrong.")
                await _error(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _answer(engine: Engine, request: HTTPRequest, ask: chat.ChatAsk | chat.CompletionAsk) -> Response:
    ticket = await engine.submit(ask)
    kind = "chatcmpl" if isinstance(ask, chat.ChatAsk) else "cmpl"
    answer = chat.Answer(id=f"{kind}-{uuid.uuid4().hex}", ask=ask, rows=ticket.rows, tokenizer=engine.tokenizer)
    if ask.stream:
        return _Stream(_events(engine, answer, ticket), lambda: engine.scheduler.cancel(ticket))
    gone = asyncio.create_task(_disconnected(request))
    collecting = asyncio.create_task(_collect(ticket))
    try:
        await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        pieces = collecting.result()
        if ask.top_logprobs_wanted() is None:
            return _json(answer.whole(pieces))
        return _json(await engine.spelled(lambda: answer.whole(pieces)))
    finally:
        gone.cancel()
        collecting.cancel()
        engine.scheduler.cancel(ticket)


async def _pieces(ticket: Ticket) -> AsyncIterator[Piece]:
    """All pieces of all choices as they come. Raises Broken when the model fails."""
    left = len(ticket.rows)
    while left:
        piece = await ticket.pieces.get()
        if piece.finish == "error":
            raise Broken("The model failed on this request; other requests go on.")
        left -= piece.finish is not None
        yield piece


async def _collect(ticket: Ticket) -> list[Piece]:
    return [piece async for piece in _pieces(ticket)]


async def _events(engine: Engine, answer: chat.Answer, ticket: Ticket) -> AsyncIterator[bytes]:
    seen, left = [0] * len(ticket.rows), len(ticket.rows)
    for chunk in answer.opening():
        yield _event(chunk)
    try:
        async for piece in _pieces(ticket):
            left -= piece.finish is not None
            last = left == 0 and not answer.ask.stream_options.include_usage
            spelled = answer.ask.top_logprobs_wanted() is not None
            if piece.text or piece.finish or spelled:
                make = partial(answer.chunk, piece, seen[piece.index])
                chunk = await engine.spelled(make) if spelled else make()
                yield _event(chunk | {"tunesmith": answer.measured()} if last else chunk)
            seen[piece.index] += len(piece.text)
        if answer.ask.stream_options.include_usage:
            yield _event(answer.closing())
    except Broken as error:
        yield _event(error_json(error))
    yield b"data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; `ended` is called however the response ends, also when the client goes away."""

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: HTTPRequest, limits: Limits) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limits.body_bytes:
            raise TooLarge(f"The request is larger than {limits.body_bytes} bytes.")
    return bytes(data)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _error(error: TunesmithError) -> Response:
    headers = {"retry-after": "1"} if error.http_status in (429, 503) else None
    return Response(orjson.dumps(error_json(error)), error.http_status, headers, media_type="application/json")


async def _refuse(request: HTTPRequest, error: Exception) -> Response:
    """What a person caused, in its own words; of anything else only that it happened, and the log has the rest."""
    return _error(error if isinstance(error, TunesmithError) else Broken("Something failed.", hint="See the log."))


async def _unknown(request: HTTPRequest, error: Exception) -> Response:
    response = _error(NotFound(f"There is no {request.method} {request.url.path[:100]}."))
    response.status_code = getattr(error, "status_code", 404)
    return response


def _metrics(engine: Engine) -> tuple[Any, Callable[[Row], None]]:
    """The engine's figures for Prometheus, and what counts an ended row into them."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    registry, scheduler = CollectorRegistry(), engine.scheduler
    name = "tunesmith_engine"
    Gauge(f"{name}_running", "Requests decoding now", registry=registry).set_function(lambda: scheduler.running)
    Gauge(f"{name}_waiting", "Requests in the queue", registry=registry).set_function(lambda: scheduler.waiting)
    Gauge(f"{name}_background", "Background requests waiting or set aside", registry=registry).set_function(
        lambda: scheduler.background
    )
    Gauge(f"{name}_adapters", "Adapters loaded", registry=registry).set_function(lambda: len(engine.adapters.names()))
    Gauge(f"{name}_busy_seconds", "Time spent in the model since the start", registry=registry).set_function(
        lambda: scheduler.busy_seconds
    )
    Gauge(f"{name}_steps", "Steps taken since the start", registry=registry).set_function(lambda: scheduler.steps)
    requests = Counter(f"{name}_requests", "Requests ended", ["finish"], registry=registry)
    prompt = Counter(f"{name}_prompt_tokens", "Tokens read", registry=registry)
    completion = Counter(f"{name}_completion_tokens", "Tokens written", registry=registry)
    first = Histogram(
        f"{name}_first_token_seconds", "From arrival to the first token, not of background requests", registry=registry
    )

    def count(row: Row) -> None:
        requests.labels(row.finish).inc()
        prompt.inc(len(row.request.prompt))
        completion.inc(len(row.tokens))
        if row.first_at and not row.request.background:
            first.observe(row.first_at - row.created_at)

    return registry, count


async def _beat(beat: Callable[[], None]) -> None:
    while True:
        await asyncio.to_thread(beat)
        await asyncio.sleep(BEAT_SECONDS)
