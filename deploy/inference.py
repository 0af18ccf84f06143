"""One inference request from its first byte to its event: the gateway's hot path, raw ASGI.

A request works on the one picture of what serves that it saw at its beginning, so a promotion in the middle of it
changes nothing about it. When its client goes away, the connection to the engine is closed and the slot there is
free again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import orjson
from starlette.types import Receive, Scope, Send

from deploy.auth import NotAllowed, error_json
from deploy.budgets import Budgets, OverLimit
from deploy.call import CHARACTERS, Call
from deploy.follower import Follower
from deploy.metrics import Metrics
from deploy.recorder import Event, Recorder
from deploy.routing import Place, Served, parse, pick
from deploy.shapes import BACKGROUND, BadRequest, Kind, for_engine, parse_request
from deploy.upstream import Busy, LeftAlone, Upstream
from infra.errors import TunesmithError
from infra.storage import text_digest
from registry.privacy import redact
from registry.profile import FEATURES, Answer, input_text, text_of

log = logging.getLogger(__name__)

_PATHS = {"chat": "/chat/completions", "completion": "/completions"}
_NO_FEATURES = (float("nan"),) * len(FEATURES)
_GONE = 499  # nginx's number for a client that closed the connection
KEPT_CHARACTERS = 65_536  # of a request, the newest of them, where a model keeps text; as many of an answer: redaction
# runs on the event loop
SHADOWS = 8  # copies under way at once; more are dropped and counted
SHADOW_SECONDS = 120.0  # that a copy may take in an engine, which others may keep busy all the time


class TooLarge(BadRequest):
    http_status: ClassVar[int] = 413
    code: ClassVar[str] = "too_large"


class TooSlow(BadRequest):
    http_status: ClassVar[int] = 408
    code: ClassVar[str] = "too_slow"


class _Left(Exception):
    """A client went away before all of its request had come."""


class _Stalled(Exception):
    """A client does not read its answer."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one gateway process takes on."""

    body_bytes: int = 2**20
    body_seconds: float = 30.0  # for a request's body to arrive
    send_seconds: float = 30.0  # for a client to take a piece of its answer
    concurrent: int = 128

    @property
    def background(self) -> int:
        """Of `concurrent`, places that requests may take which make way for others."""
        return max(1, self.concurrent // 4)


class Inference:
    """Answers inference requests; one a gateway."""

    def __init__(
        self,
        follower: Follower,
        upstream: Upstream,
        recorder: Recorder,
        metrics: Metrics,
        budgets: Budgets,
        limits: Limits,
    ) -> None:
        self.follower = follower
        self.upstream = upstream
        self.recorder = recorder
        self.metrics = metrics
        self.budgets = budgets
        self.limits = limits
        self._in_flight = 0
        self._making_way = 0  # of these, for others
        self._of_key: Counter[str] = Counter()
        self._of_model: Counter[str] = Counter()
        self._clients_of_model: Counter[str] = Counter()  # without what we ask ourselves
        self._shadows: set[asyncio.Task[None]] = set()

    def endpoint(self, kind: Kind) -> _Endpoint:
        """The ASGI application of ``/v1/chat/completions`` or ``/v1/completions``."""
        return _Endpoint(self, kind)

    async def finish(self) -> None:
        """End the copies that are under way."""
        for task in self._shadows:
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)

    async def handle(self, kind: Kind, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        call = Call(kind, scope["identity"], _clean(headers.get(b"x-request-id")))
        self._in_flight += 1
        self._of_key[call.identity.key_id] += 1
        call.has_place = True
        self.metrics.in_flight.set(self._in_flight)
        try:
            if not call.identity.may("service"):
                raise NotAllowed(
                    f"The key {call.identity.name} has the role {call.identity.role}; asking models needs service.",
                    hint="Use a key of role service, operator or admin.",
                )
            if self._in_flight > self.limits.concurrent:
                raise Busy("Too many requests are being answered.", hint="Try again in a second.")
            self.budgets.check_places("key", call.identity.key_id, self._of_key[call.identity.key_id])
            call.asked = parse_request(kind, await self._body(headers, receive))
            call.wanted = parse(call.asked.model)
            self._of_model[call.wanted.model] += 1
            if call.identity.watched:
                self._clients_of_model[call.wanted.model] += 1
                self.budgets.check_places("model", call.wanted.model, self._clients_of_model[call.wanted.model])
            if self._of_model[call.wanted.model] > self._places_of_model():
                raise Busy(
                    f"Too many requests to {call.wanted.model} are being answered.", hint="Try again in a second."
                )
            if call.asked.background:
                self._making_way += 1
                call.makes_way = True
            if call.makes_way and self._making_way > self.limits.background:
                raise Busy("Too many background requests are being answered.", hint="Try again later.")
            await self.budgets.admit(call.identity.key_id, call.wanted.model, watched=call.identity.watched)
            await self._unless_gone(call, receive, self._answer(call, send))
        except TunesmithError as error:
            call.fail(error)
            await self._explain(call, send, error)
        except asyncio.CancelledError:
            call.status, call.error = _GONE, "the client went away, or the gateway was stopped"
            raise
        except _Left:
            call.status, call.error = _GONE, "the client went away"
        except _Stalled:
            call.status, call.error = _GONE, f"the client read nothing for {self.limits.send_seconds:g} s"
        except Exception as error:
            log.exception("request %s failed", call.id)
            call.status, call.error = 500, f"{type(error).__name__}: {error}"
            await self._explain(call, send, TunesmithError("Something failed here.", hint="See the gateway's log."))
        finally:
            self._finish(call)

    def _finish(self, call: Call) -> None:
        """Free its place and record it, once: before the last byte goes out, since its client may then ask again, and
        what was answered is recorded whenever a kill comes."""
        if not call.has_place:
            return
        call.has_place = False
        self._in_flight -= 1
        self._making_way -= call.makes_way
        _less(self._of_key, call.identity.key_id)
        if call.wanted is not None:
            _less(self._of_model, call.wanted.model)
            if call.identity.watched:
                _less(self._clients_of_model, call.wanted.model)
        self.metrics.in_flight.set(self._in_flight)
        self._record(call)

    def _places_of_model(self) -> int:
        """Where there are others a model leaves them a quarter of the places, whatever becomes of its engines."""
        limit = self.limits.concurrent
        return limit if len(self.follower.table.routes) < 2 else max(1, limit - limit // 4)

    # ------------------------------------------------------------ in

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The request's body. Raises TooLarge before reading what is announced as too large, TooSlow."""
        limit = self.limits.body_bytes
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            raise TooLarge(f"The body is larger than {limit} bytes.")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise TooLarge(f"The body is larger than {limit} bytes.")
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise TooSlow(f"The body did not arrive within {self.limits.body_seconds:g} seconds.") from None

    async def _unless_gone(self, call: Call, receive: Receive, answering: Any) -> None:
        """Answer, but stop as soon as the client goes away. Raises _Left then."""
        me, left = asyncio.current_task(), False
        assert me is not None  # noqa: S101

        async def watch() -> None:
            nonlocal left
            await _gone(receive)
            left = True
            me.cancel()

        watching = asyncio.ensure_future(watch())
        try:
            await answering
        except asyncio.CancelledError:
            if not left or me.uncancel():  # the gateway is being stopped as well
                raise
            raise _Left from None
        finally:
            watching.cancel()

    # ------------------------------------------------------------ out

    async def _answer(self, call: Call, send: Send) -> None:
        asked, wanted = call.asked, call.wanted
        assert asked is not None and wanted is not None  # noqa: S101, PT018
        table = self.follower.table
        picked = pick(table, wanted, asked.user or str(call.id))
        if picked is None:
            assert wanted.number is not None  # noqa: S101
            served = await self.follower.warm(wanted.model, wanted.number)
            call.served, call.slot = served, "pinned"
            table = self.follower.table
        else:
            served, call.slot = picked
            call.served = served
        if call.slot == "pinned":
            self.follower.used(served)
        places = table.places(served)
        body = for_engine(asked, served)
        if asked.stream:
            await self._stream(call, places, body, send)
        else:
            answer = await self.upstream.complete(places, served, _PATHS[call.kind], body)
            call.take(answer)
            call.first_at = None  # the whole answer came at once; only the engine saw its first token
            call.status = 200
            waited = ((b"x-tunesmith-queue-ms", b"%d" % round(call.queue_ms)),)
            await self._send_whole(call, send, orjson.dumps(answer), waited)
        route = table.routes.get(wanted.model)
        if route is not None and route.shadow is not None and wanted.number is None:
            self._copy(call, route.shadow, table.places(route.shadow))

    async def _stream(self, call: Call, places: tuple[Place, ...], body: dict[str, Any], send: Send) -> None:
        asked, served = call.asked, call.served
        assert asked is not None and served is not None  # noqa: S101, PT018
        async with aclosing(self.upstream.stream(places, served, _PATHS[call.kind], body)) as chunks:
            async for chunk in chunks:
                call.take(chunk)
                if not call.sent:
                    await self._send_head(call, send, 200, b"text/event-stream; charset=utf-8", ())
                if not asked.wants_usage:
                    chunk.pop("usage", None)
                    if not chunk.get("choices"):
                        continue
                await self._send_piece(send, orjson.dumps(chunk), more=True)
        call.status = 200
        self._finish(call)
        await self._send_piece(send, b"[DONE]")

    async def _send_piece(self, send: Send, data: bytes, *, more: bool = False) -> None:
        """Of a stream. Raises _Stalled when the client takes nothing."""
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})
        except TimeoutError:
            raise _Stalled from None

    async def _send_head(
        self, call: Call, send: Send, status: int, content_type: bytes, more: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        limit = self.limits.concurrent
        places = {
            b"x-ratelimit-limit-requests": b"%d" % limit,
            b"x-ratelimit-remaining-requests": b"%d" % max(0, limit - self._in_flight),
            b"x-ratelimit-reset-requests": b"1s",
        }
        headers = [
            (b"content-type", content_type),
            (b"x-request-id", str(call.id).encode()),
            *(places | dict(self.budgets.headers(call.identity.key_id))).items(),
            *more,
        ]
        if call.served is not None:
            headers.append((b"x-tunesmith-version", call.served.name.encode()))
        call.sent = True
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_whole(
        self, call: Call, send: Send, body: bytes, more: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        length = ((b"content-length", b"%d" % len(body)), *more)
        await self._send_head(call, send, call.status, b"application/json", length)
        self._finish(call)
        await send({"type": "http.response.body", "body": body})

    async def _explain(self, call: Call, send: Send, error: TunesmithError) -> None:
        """Tell the client what went wrong: an answer of its own, or the last piece of the stream it is reading."""
        body = orjson.dumps(error_json(error))
        if call.sent:
            self._finish(call)
            with suppress(_Stalled):
                await self._send_piece(send, body)
            return
        seconds = error.retry_after if isinstance(error, OverLimit | Busy | LeftAlone) else 1
        more = ((b"retry-after", b"%d" % seconds),) if error.http_status in (429, 503) else ()
        if error.http_status in (408, 413):  # the rest of the body was not read
            more = ((b"connection", b"close"),)
        await self._send_whole(call, send, body, more)

    # ------------------------------------------------------------ afterwards

    def _record(self, call: Call) -> None:
        asked, served = call.asked, call.served
        seconds = time.perf_counter() - call.started
        ttft_ms = (call.first_at - call.started) * 1000 if call.first_at is not None else call.engine_ttft_ms
        if call.background:
            seconds, ttft_ms = max(0.0, seconds - call.queue_ms / 1000), None
        name = served.name if served else "none"
        self.metrics.requests.labels(name, call.slot, str(call.status)).inc()
        features, cost = _NO_FEATURES, 0.0
        prompt, completion, engine_seconds = call.prompt_tokens, call.completion_tokens, call.engine_seconds
        if served is not None and asked is not None and not prompt and (call.pieces or call.status == _GONE):
            # Nobody counted, or the client hung up before that: about as much as was read and said
            prompt = 1 + len(input_text(asked.messages)) // CHARACTERS
            completion = completion or call.pieces
            if call.status == _GONE:
                engine_seconds = time.perf_counter() - (call.first_at or call.started)
        kept: Any = None
        answer: str | None = None
        if served is not None:
            self.metrics.latency.labels(name).observe(seconds)
            self.metrics.tokens.labels(name, "prompt").inc(prompt)
            self.metrics.tokens.labels(name, "completion").inc(completion)
            if call.first_at is not None:
                self.metrics.first_token.labels(name).observe(call.first_at - call.started)
            cost = served.price.cost_usd(prompt, completion, engine_seconds)
            if call.slot == "shadow":
                self.budgets.spend_copy(served.model, cost)
            else:
                tokens = prompt + completion
                who = call.identity
                self.budgets.spend(who.key_id, served.model, tokens=tokens, usd=cost, watched=who.watched)
        if asked is not None and served is not None and call.status == 200:
            text = "".join(call.text)
            features = tuple(
                served.extractor.features(
                    asked.messages,
                    Answer(
                        text=text,
                        completion_tokens=completion,
                        finish_reason=call.finish_reason,
                        mean_logprob=call.mean_logprob,
                    ),
                    prompt,
                )
            )
            if served.keep_text:
                kept, room = [], KEPT_CHARACTERS
                for message in reversed(asked.messages):
                    said = text_of(message["content"])
                    kept.append({"role": message["role"], "content": _kept(said[:room])})
                    room = max(0, room - len(said))
                kept.reverse()
                answer = _kept(text)
        self.recorder.put(
            Event(
                id=call.id,
                model=call.wanted.model if call.wanted else "",
                version=served.number if served else None,
                slot=call.slot,
                key_id=call.identity.key_id,
                client_request_id=call.client_request_id,
                status=call.status,
                error=_without_nul(call.error)[:500] if call.error else None,
                stream=asked.stream if asked else False,
                prompt_tokens=prompt,
                completion_tokens=completion,
                ttft_ms=ttft_ms,
                latency_ms=seconds * 1000,
                engine_seconds=engine_seconds,
                cost_usd=cost,
                finish_reason=call.finish_reason,
                features=features,
                subject=text_digest(asked.user) if asked and asked.user else None,
                messages=kept,
                answer=answer,
            )
        )

    def _copy(self, call: Call, shadow: Served, places: tuple[Place, ...]) -> None:
        """Ask the shadow version the same, after the client has its answer and while the engine has nobody else's to
        make; only the event tells of it."""
        if len(self._shadows) >= SHADOWS or not self.budgets.affords_copy(shadow.model):
            self.metrics.shadow_dropped.inc()
            return
        copies = tuple(replace(place, copy=place.hosted) for place in places)  # engines know them by their priority
        task = asyncio.create_task(self._ask_shadow(call, shadow, copies))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _ask_shadow(self, original: Call, shadow: Served, places: tuple[Place, ...]) -> None:
        # Its event names the request it is a copy of as its client's id.
        call = Call(original.kind, original.identity, str(original.id))
        asked = original.asked
        assert asked is not None  # noqa: S101
        call.asked, call.wanted, call.served, call.slot = asked, original.wanted, shadow, "shadow"
        body = for_engine(asked, shadow)
        body.pop("stream", None)
        body.pop("stream_options", None)
        body["priority"] = max(BACKGROUND, body.get("priority", 0))
        try:
            async with asyncio.timeout(None if shadow.hosted else SHADOW_SECONDS):
                call.take(await self.upstream.complete(places, shadow, _PATHS[call.kind], body))
            call.first_at, call.status = None, 200
            same = "".join(call.text) == "".join(original.text)
            self.metrics.shadow_answers.labels(shadow.name, "same" if same else "other").inc()
        except TimeoutError:
            call.status, call.error = Busy.http_status, f"{Busy.code}: the engine had no time for it"
        except TunesmithError as error:
            call.fail(error)
        except asyncio.CancelledError:
            call.status, call.error = _GONE, "the gateway was stopped"
            raise
        finally:
            self._record(call)


class _Endpoint:
    """An instance, so that Starlette's router takes it for an ASGI application and adds nothing."""

    def __init__(self, inference: Inference, kind: Kind) -> None:
        self._inference = inference
        self._kind: Literal["chat", "completion"] = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._inference.handle(self._kind, scope, receive, send)


def _less(count: Counter[str], name: str) -> None:
    count[name] -= 1
    if not count[name]:
        del count[name]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _clean(header: bytes | None) -> str | None:
    """A client's own request id: printable, at most 128 characters."""
    if header is None:
        return None
    return "".join(c for c in header.decode("latin-1") if c.isprintable())[:128] or None


def _kept(text: str) -> str:
    return redact(_without_nul(text[:KEPT_CHARACTERS]))


def _without_nul(text: str) -> str:
    return text.replace("\0", "�")  # PostgreSQL's text cannot hold it
