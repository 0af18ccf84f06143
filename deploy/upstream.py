"""How the gateway has answers made: by engines over vLLM's HTTP contract, and by hosted models over OpenAI's.

A request that has not answered anything yet is tried again, at the next place where there is one, at most `ATTEMPTS`
times, or once at each place where there are more; after its first token it is not, since the client has that token.
The same happens to those that wait for an engine which is known to be gone. Engines of one base take turns; hosted
models are asked in the version's order. A place that keeps failing is left alone for a while (deploy/breaker.py).
`priority` in a body, by which background requests make way for others, is vLLM's and our engine's, and told to engines
only.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import re
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import lru_cache
from typing import Any, ClassVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson

from deploy.breaker import LONGEST, Breaker
from deploy.routing import Place, Served
from infra.errors import TunesmithError, Unreachable, UsageError
from infra.web import retry_after
from registry.upstreams import read_key

log = logging.getLogger(__name__)

ATTEMPTS = 3
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 600.0  # for a whole answer; engines may be silent for as long, while a request waits its turn
SILENCE_SECONDS = 120.0  # between two pieces of a hosted model's
PATIENCE_SECONDS = 120.0  # after which nobody else is asked
_END_SECONDS = 0.02  # for the end of a stream whose last piece is there
_ENGINE_RESTS = 2.0  # seconds at most that a failing engine is left alone
_PLACES = 1000  # that anything is remembered of
_ANSWER_BYTES, _ENGINE_BYTES = 16 * 2**20, 256 * 2**20  # engines tell many log-probabilities, if asked
_SAID = 500
_WORD = re.compile(r"[a-z][a-z_]{0,63}")


class BadAnswer(TunesmithError):
    """Who answers died in the middle of an answer, or what it said is not an answer."""

    http_status: ClassVar[int] = 502
    code: ClassVar[str] = "upstream"
    unquoted: str | None = None


class Busy(TunesmithError):
    """No place for another request before `retry_after` seconds."""

    http_status: ClassVar[int] = 429
    code: ClassVar[str] = "busy"
    retry_after: int = 1
    unquoted: str | None = None


class LeftAlone(Unreachable):
    """Nobody is asked before `retry_after` seconds: all failed again and again."""

    retry_after: int = 1


class Declined(UsageError):
    """Who was asked does not take the request, and says why in its own words."""

    unquoted: str | None = None


class NotTaken(BadAnswer):
    """An engine does not take an adapter."""


def own_words(error: TunesmithError) -> str:
    """An error's message, without what somebody else says in it: that may repeat what was asked."""
    return getattr(error, "unquoted", None) or error.message


class _TryAgain(Exception):
    """This attempt failed in a way that another may not; the cause says how. `sick`: the place itself is to blame.
    `mended`: what was in the way is gone."""

    def __init__(self, *, sick: bool = True, mended: bool = False) -> None:
        self.sick, self.mended = sick, mended


class Upstream:
    """The gateway's client of engines and hosted models; belongs to one event loop. `open` it, `close` it."""

    def __init__(self, secret: str | None) -> None:
        self._headers = {"authorization": f"Bearer {secret}"} if secret else {}
        self._turn = itertools.count()
        self._engines: aiohttp.ClientSession | None = None
        self._hosted: aiohttp.ClientSession | None = None
        self.retries = 0
        self.breakers: dict[str, Breaker] = {}  # by a place's name
        self._alive: frozenset[str] | None = None  # addresses of engines, once they are known
        self._unanswered: dict[asyncio.Timeout, str] = {}  # attempts without a token, and the address that is asked

    async def open(self) -> None:
        # Engines are private: requests to them never go through a proxy, and their secret goes nowhere else
        self._engines, self._hosted = _session(self._headers), _session({})

    async def close(self) -> None:
        for session in (self._engines, self._hosted):
            if session is not None:
                await session.close()

    def forget(self, upstreams: Collection[str]) -> None:
        """Ask at these as if they had never failed."""
        for name in list(self.breakers):
            if name.split("/")[0] in upstreams:
                del self.breakers[name]

    def engines_alive(self, addresses: Collection[str]) -> None:
        """Only these engines are there: who waits for another one's first token is asked elsewhere at once, instead of
        for as long as a connection to nobody may be silent."""
        self._alive = frozenset(addresses)
        for limit, address in list(self._unanswered.items()):
            if address not in self._alive:
                limit.reschedule(asyncio.get_running_loop().time())

    def _may_live(self, place: Place) -> bool:
        return place.hosted or self._alive is None or place.url in self._alive

    # ------------------------------------------------------------ answers

    async def complete(self, places: Sequence[Place], served: Served, path: str, body: Mapping[str, Any]) -> Any:
        """The whole answer, as the JSON object that came. Raises as `stream` does."""
        answers = [answer async for answer in self._attempts(places, served, path, body, stream=False)]
        return answers[0]

    def stream(
        self, places: Sequence[Place], served: Served, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's chunks; use it in `contextlib.aclosing`: closing it closes the connection, by which an engine
        frees the slot.

        Raises Unreachable (nobody answers), Busy, UsageError (the request is refused), BadAnswer; after the first chunk
        only BadAnswer.
        """
        return self._attempts(places, served, path, body, stream=True)

    async def _attempts(
        self, places: Sequence[Place], served: Served, path: str, body: Mapping[str, Any], *, stream: bool
    ) -> AsyncGenerator[Any, None]:
        if not places:
            raise _nowhere(served)
        first = 0 if served.hosted else next(self._turn)
        order = [places[(first + n) % len(places)] for n in range(len(places))]
        failure: BaseException | None = None
        failed = order[0]
        asked = dict.fromkeys(range(len(order)), 0)
        background = not served.hosted and body.get("priority", 0) > 0
        since, mended = time.monotonic(), False
        for attempt in range(max(ATTEMPTS, len(order))):
            if time.monotonic() - since > PATIENCE_SECONDS:
                break
            # The next one in order, of those least often asked, that takes requests; where none does, waiting is no use
            turns = sorted(asked, key=asked.__getitem__)
            able = (n for n in turns if self._may_live(order[n]) and self._admits(order[n]))
            turn = next(able, None)
            if turn is None:
                break
            asked[turn] += 1
            place = order[turn]
            if attempt:
                self.retries += 1
                if asked[turn] > 1 and not mended:  # somebody else is asked at once
                    await asyncio.sleep(random.uniform(0.02, 0.1) * attempt)
            begun, held = False, list[Any]()
            limit = asyncio.timeout(None)
            if not place.hosted:
                self._unanswered[limit] = place.url
            try:
                async with limit, aclosing(self._attempt(place, served, path, body, stream=stream)) as pieces:
                    async for piece in pieces:
                        if not begun and stream and not _says_something(piece):
                            held.append(piece)  # the client has nothing yet that another could not say as well
                            continue
                        if not begun:
                            begun = True
                            self._unanswered.pop(limit, None)
                            limit.reschedule(None)
                            for early in held:
                                yield early
                        yield piece
                    if not begun:
                        for early in held:
                            yield early
                self._well(place)
                return
            except (UsageError, NotTaken):  # the place is well, the request or the version is not
                self._well(place)
                raise
            except (_TryAgain, BadAnswer, aiohttp.ClientError, OSError, TimeoutError) as error:
                gone = limit.expired() and not begun
                if (
                    background and isinstance(error, TimeoutError) and not gone
                ):  # others may have kept a place busy that is well
                    raise Busy(f"{place.who} had no time for a background request.", hint="Try again later.") from error
                failure = error.__cause__ if isinstance(error, _TryAgain) and error.__cause__ else error
                failed, mended = place, isinstance(error, _TryAgain) and error.mended
                if isinstance(error, _TryAgain) and not error.sick:
                    self._well(place)
                else:
                    self._sick(place, failure)
                if begun:
                    if isinstance(failure, BadAnswer):
                        raise failure from None
                    raise BadAnswer(f"{place.who} broke off in the middle of an answer.") from failure
            finally:
                self._unanswered.pop(limit, None)
        if isinstance(failure, TunesmithError):
            raise failure
        if failure is None and any(map(self._may_live, order)):
            raise self._resting(order, served)
        raise _silent(failed, served) from failure

    def _admits(self, place: Place) -> bool:
        """Whether a request may go there now; a copy only where one of a client's could go too."""
        if place.copy and (of_clients := self.breakers.get(place.name)) is not None and of_clients.seconds:
            return False
        return self._breaker(place).admit()

    def _breaker(self, place: Place) -> Breaker:
        """Copies have one of their own: what befalls them keeps no client's request away."""
        name = f"{place.name} (copies)" if place.copy else place.name
        breaker = self.breakers.get(name)
        if breaker is None:
            while len(self.breakers) >= _PLACES:
                del self.breakers[next(iter(self.breakers))]
            # Which engines live is known otherwise too; one that is back must not wait
            breaker = self.breakers[name] = Breaker() if place.hosted else Breaker(longest=_ENGINE_RESTS)
        return breaker

    def _well(self, place: Place) -> None:
        breaker = self._breaker(place)
        if breaker.state != "closed":
            log.info("%s answers again", place.name)
        breaker.succeeded()

    def _sick(self, place: Place, failure: BaseException) -> None:
        breaker = self._breaker(place)
        before = breaker.state
        breaker.failed()
        if before == "closed" and breaker.state == "open":
            said = own_words(failure) if isinstance(failure, TunesmithError) else failure or type(failure).__name__
            log.warning("%s keeps failing and is left alone for a while: %s", place.name, said)

    def _resting(self, places: Sequence[Place], served: Served) -> TunesmithError:
        """Nobody may be asked just now: all failed again and again, or asked for a pause."""
        seconds = max(1, math.ceil(min(self._breaker(place).seconds for place in places)))
        who = " and ".join(place.name for place in places) if served.hosted else places[0].who
        if all(self._breaker(place).state == "closed" for place in places):
            busy = Busy(f"{who} had too many requests of {served.name}.", hint=f"Try again in {seconds} s.")
            busy.retry_after = seconds
            return busy
        left = LeftAlone(f"{who} failed again and again.", hint=f"{served.name} is tried again in {seconds} s.")
        left.retry_after = seconds
        return left

    async def _attempt(
        self, place: Place, served: Served, path: str, body: Mapping[str, Any], *, stream: bool
    ) -> AsyncGenerator[Any, None]:
        asked = {**body, **place.options, "model": place.model}
        if place.hosted and "priority" not in place.options:
            asked.pop("priority", None)
        if None in place.options.values():
            asked = {name: value for name, value in asked.items() if value is not None}
        key = _key(place)
        async with self._post(place, path, orjson.dumps(asked), key) as response:
            if response.status != 200:
                await self._explain(place, served, response, key)
            if not stream:
                answer = _answer(await _whole(response, place), place, key)
                if not answer["choices"]:
                    raise BadAnswer(f"{place.who}'s answer has no choices.")
                yield answer
                return
            empty = True
            try:
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    text = line[5:].strip()
                    if text == b"[DONE]":
                        if empty:
                            raise BadAnswer(f"{place.who}'s stream was empty.")
                        if place.hosted:  # a connection whose end was not read is closed, and the next one costs
                            with suppress(TimeoutError):
                                async with asyncio.timeout(_END_SECONDS):
                                    await response.content.readany()
                        return
                    try:
                        piece = _answer(text, place, key)
                    except BadAnswer as failed:
                        if place.hosted:
                            raise
                        raise _TryAgain(sick=False) from failed  # the engine lives, whatever this version computes
                    yield piece
                    empty = False
            except ValueError as error:  # a line without an end
                raise BadAnswer(f"{place.who} does not answer in lines.") from error
            raise aiohttp.ClientPayloadError("the stream ended early")

    async def _explain(self, place: Place, served: Served, response: aiohttp.ClientResponse, key: str | None) -> None:
        """Raise what a refusal means here."""
        try:
            answer = orjson.loads(await _whole(response, place))
            said, which = _said(answer, key), _which(answer, key)
        except orjson.JSONDecodeError:
            said, which = f"status {response.status}", {}
        if place.hosted:
            self._explain_hosted(place, response, said, which)
        if response.status == 404 and served.adapter_path is not None:
            # The engine was restarted, or let go of the adapter to make room.
            try:
                await self.load(place.url, served)
            except Unreachable:
                raise _TryAgain from None
            raise _TryAgain(sick=False, mended=True)
        if response.status in (429, 503):
            raise _TryAgain(sick=False) from Busy(f"The engine is full: {said}", hint="Try again in a second.")
        if response.status in (400, 413, 422):
            raise _declined(place, response.status, said, which)
        # It answers, so it lives; this request or this adapter is what it cannot do
        raise _TryAgain(sick=False) from _failed(place, response.status, said)

    def _explain_hosted(
        self, place: Place, response: aiohttp.ClientResponse, said: str, which: Mapping[str, str]
    ) -> None:
        if response.status == 429:
            busy = Busy(f"{place.who} takes no more requests now: {said}", hint="Try again later.")
            busy.unquoted = f"{place.who} takes no more requests now"
            seconds = retry_after(response.headers.get("retry-after", ""), 1.0)
            self._breaker(place).pause(seconds)
            busy.retry_after = max(1, math.ceil(min(seconds, LONGEST)))
            raise _TryAgain(sick=False) from busy
        if response.status in (400, 413, 422):
            raise _declined(place, response.status, said, which)
        if response.status in (401, 403):  # such messages tend to repeat the key
            said = "it refuses the key"
        # 404 and 405: a path or model it has not
        raise _TryAgain(sick=response.status not in (404, 405)) from _failed(place, response.status, said)

    # ------------------------------------------------------------ adapters

    async def load(self, engine: str, served: Served) -> None:
        """Make an engine hold a version's adapter; one that is there already stays. Raises BadAnswer, Unreachable."""
        if served.adapter_path is None:
            return
        asked = {"lora_name": served.adapter, "lora_path": served.adapter_path, "digests": dict(served.digests)}
        data = orjson.dumps(asked)  # vLLM takes no notice of the digests
        status, said = await self._tell(engine, "/v1/load_lora_adapter", data)
        if status in (429, 503):
            raise Unreachable(f"The engine takes nothing now: {said}")
        if status != 200 and not (status == 400 and "already been loaded" in said):  # vLLM's words
            raise NotTaken(f"The engine does not take {served.name}: {said}")

    async def unload(self, engine: str, adapter: str) -> None:
        """Make an engine let go of an adapter; one that is not there is no error. Raises Unreachable."""
        await self._tell(engine, "/v1/unload_lora_adapter", orjson.dumps({"lora_name": adapter}))

    async def try_out(self, places: Sequence[Place], served: Served) -> None:
        """One short request to a version at the first of the places that answers, also at one that was left alone;
        returns when one did. Raises BadAnswer, Busy, UsageError, Unreachable."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0}
        failure: TunesmithError = _nowhere(served)
        for place in places:
            try:
                answer = self._attempt(place, served, "/chat/completions", body, stream=False)
                async with asyncio.timeout(SILENCE_SECONDS), aclosing(answer):
                    await anext(answer)
            except _TryAgain as error:
                known = error.__cause__
                failure = known if isinstance(known, TunesmithError) else _silent(place, served)
            except TunesmithError as error:
                failure = error
            except (aiohttp.ClientError, OSError, TimeoutError):
                failure = _silent(place, served)
            else:
                self._well(place)
                return
        raise failure

    async def _tell(self, engine: str, path: str, data: bytes) -> tuple[int, str]:
        try:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
            async with self._session(self._engines).post(engine + path, data=data, timeout=timeout) as response:
                text = await response.text()
                if response.status == 200:
                    return 200, text
                try:
                    return response.status, _said(orjson.loads(text))
                except orjson.JSONDecodeError:
                    return response.status, text[:200]
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"The engine at {engine} does not answer: {error}") from error

    def _post(self, place: Place, path: str, data: bytes, key: str | None) -> Any:
        if not place.hosted:
            return self._session(self._engines).post(place.url + "/v1" + path, data=data)
        return self._session(self._hosted).post(
            place.url + path,
            data=data,
            headers={"authorization": f"Bearer {key}"} if key else {},
            allow_redirects=False,
            proxy=_proxy(place.url),
            timeout=aiohttp.ClientTimeout(
                total=ANSWER_SECONDS, connect=CONNECT_SECONDS, sock_read=place.seconds or SILENCE_SECONDS
            ),
        )

    @staticmethod
    def _session(session: aiohttp.ClientSession | None) -> aiohttp.ClientSession:
        if session is None:
            raise RuntimeError("Upstream is not open")
        return session


def _says_something(chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk holds anything of an answer: many begin with one that but names who speaks."""
    return bool(chunk.get("usage")) or any(
        choice.get("finish_reason")
        or choice.get("text")
        or any(value for name, value in (choice.get("delta") or {}).items() if name != "role")
        for choice in chunk["choices"]
    )


def _declined(place: Place, status: int, said: str, which: Mapping[str, str]) -> Declined:
    error = Declined(said, details=which)
    error.unquoted = f"{place.who} declined the request with status {status}"
    return error


def _failed(place: Place, status: int, said: str) -> BadAnswer:
    error = BadAnswer(f"{place.who} failed with status {status}: {said}")
    error.unquoted = f"{place.who} failed with status {status}"
    return error


def _nowhere(served: Served) -> Unreachable:
    if served.hosted:
        names = " or ".join(sorted({each.upstream for each in served.hosted.models}))
        return Unreachable(
            f"{served.name} is asked at {names}, which has no address here.", hint="See `tunesmith upstream list`."
        )
    return Unreachable(f"No engine runs for the base of {served.name}.", hint="`tunesmith status` shows the engines.")


def _session(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
        timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS, connect=CONNECT_SECONDS),
        headers={**headers, "content-type": "application/json"},
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        skip_auto_headers=("accept-encoding",),  # pieces of a stream that are packed may come late
        read_bufsize=2**20,
    )


def _silent(place: Place, served: Served) -> Unreachable:
    hint = "See `tunesmith upstream list`." if place.hosted else "Try again; `tunesmith status` shows the engines."
    return Unreachable(f"{place.who} of {served.name} does not answer.", hint=hint)


def _key(place: Place) -> str | None:
    """Raises _TryAgain where it should have one: elsewhere there may be."""
    try:
        return read_key(place.key_env)
    except ValueError as error:
        raise _TryAgain from BadAnswer(f"{place.who} cannot be asked: {error}.")


@lru_cache(maxsize=256)
def _proxy(url: str) -> str | None:
    """What the environment says, as of this process's start; not for this machine. aiohttp's own `trust_env` would read
    it, and a file of passwords, for each request."""
    parts = urlsplit(url)
    if parts.hostname in ("127.0.0.1", "localhost", "::1") or proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


async def _whole(response: aiohttp.ClientResponse, place: Place) -> bytes:
    data, most = bytearray(), _ANSWER_BYTES if place.hosted else _ENGINE_BYTES
    async for part in response.content.iter_any():
        data += part
        if len(data) > most:
            raise BadAnswer(f"{place.who} answered with more than {most} bytes.")
    return bytes(data)


def _answer(data: bytes, place: Place, key: str | None) -> dict[str, Any]:
    """An answer, or a chunk of one. Raises BadAnswer for what is none."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadAnswer(f"{place.who} did not answer in JSON.") from error
    if not isinstance(value, dict):
        raise BadAnswer(f"{place.who} did not answer with an object.")
    if value.get("error") is not None:
        failed = BadAnswer(f"{place.who} failed: {_said(value, key)}")
        failed.unquoted = f"{place.who} failed"
        raise failed
    choices = value.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadAnswer(f"{place.who}'s answer has no choices.")
    try:  # what is read of it later, so that another place can be asked now
        usage = value.get("usage") or {}
        [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        said = [choice.get("delta") or choice.get("message") or choice for choice in choices]
        well = all(isinstance(each.get("content") or each.get("text") or "", str) for each in said)
    except (AttributeError, TypeError, ValueError, OverflowError):
        well = False
    if not well:
        raise BadAnswer(f"{place.who}'s answer is not of OpenAI's shape.")
    return value


def _which(answer: Any, key: str | None) -> dict[str, str]:
    """`code` and `param` of an error object of OpenAI's shape, by which programs tell one refusal from another; not
    what repeats the key."""
    error = answer.get("error") if isinstance(answer, dict) else None
    given = {name: error.get(name) for name in ("code", "param")} if isinstance(error, dict) else {}
    words = {name: value for name, value in given.items() if isinstance(value, str) and _WORD.fullmatch(value)}
    return {name: value for name, value in words.items() if not key or key not in value}


def _said(answer: Any, key: str | None = None) -> str:
    """The message inside an error object of OpenAI's or FastAPI's shape, without the key."""
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if message:
            return (str(message).replace(key, "***") if key else str(message))[:_SAID]
    return "no reason given"
