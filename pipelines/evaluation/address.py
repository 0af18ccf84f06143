"""An OpenAI-shaped address: chat requests, a few at a time, and what became of each.

Time-outs, 429 and 5xx are tried again, 429 and 503 after what Retry-After asks for; what fails all the same is counted
and has no answer. An address that is not there, refuses the key or the model, or fails again and again is given up.
The key is read from the environment when a client is made; it stands in no message, no log and no result.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from infra.web import retry_after
from pipelines import config_address
from registry.upstreams import read_key

_TRIES = 4
_LONGEST_WAIT = 60.0  # seconds that a Retry-After may ask for
_IN_A_ROW = 6  # failed requests after which the address is given up
_QUOTED = 200
_FAILURES = ("timed_out", "limited", "failed")

Messages = Sequence[Mapping[str, str]]


class Unavailable(Exception):
    """The address gives no answers, or none that can be used; `why` is a part of a sentence, without the key."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, kw_only=True)
class Said:
    """One answer. `model` is the model's name as the answer reports it; `seconds` is the wall time from the first try
    on, as whoever waited for it had it; tokens are as the address counts them, None where it does not."""

    text: str
    model: str
    seconds: float
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None = None


class Client:
    """Asks one address; safe to use from several threads, and to be closed by ``with``.

    `counts` has the requests that were ``answered``, and those that in the end ``timed_out``, were ``limited`` (429) or
    ``failed`` otherwise, and how often one was ``tried_again``.

    `key` is given where the address names no variable that holds it.

    Raises Unavailable, at once where an address, a model or the key is missing.
    """

    def __init__(
        self,
        address: config_address.Address,
        *,
        key: str | None = None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        if address.url is None or address.model is None:
            raise Unavailable(f"no {'address' if address.url is None else 'model'} is named")
        self.url, self.model, self.options = address.url, address.model, address.options
        self.parallel = address.parallel
        self.counts: Counter[str] = Counter()
        self._key = key or _key(address.key_env)
        self._wait, self._lock = wait, threading.Lock()
        self._not_before = 0.0  # of the monotonic clock: what a 429 asked all requests for
        self._in_a_row = 0
        self._given_up: str | None = None
        self._http = httpx.Client(
            timeout=address.timeout_seconds,
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ask_all(
        self,
        asked: Sequence[Messages],
        *,
        max_tokens: int,
        progress: Callable[[int], None] | None = None,
        temperature: float = 0.0,
    ) -> list[Said | None]:
        """The answers in the order of what was asked, at most `parallel` requests at a time; None for one that failed.
        Raises Unavailable when the address is given up."""
        found: list[Said | None] = []
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="address") as pool:
            futures = [
                pool.submit(self.ask, messages, max_tokens=max_tokens, temperature=temperature) for messages in asked
            ]
            try:
                for future in futures:
                    found.append(future.result())
                    if progress:
                        progress(len(found))
            finally:
                pool.shutdown(cancel_futures=True)
        return found

    def ask(self, messages: Messages, *, max_tokens: int, temperature: float = 0.0) -> Said | None:
        """One answer, or None when it failed. Raises Unavailable when the address is given up."""
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        body = {name: value for name, value in (body | dict(self.options)).items() if value is not None}
        failure, said, pause, begun = "failed", "", 0.0, math.nan
        for attempt in range(_TRIES):
            if attempt:
                self._count("tried_again")
            if (pause := max(pause, self._not_before - time.monotonic())) > 0:
                self._wait(pause)
            if self._given_up is not None:
                raise Unavailable(self._given_up)
            pause, begun = 2.0**attempt / 2, time.perf_counter() if attempt == 0 else begun
            try:
                response = self._http.post(f"{self.url}/chat/completions", json=body)
            except httpx.TimeoutException:
                failure, said = "timed_out", "timed out"
                if attempt:
                    break  # twice will do: time-outs are long
                continue
            except httpx.ConnectError as error:
                if attempt:
                    self._give_up(f"{self.url} does not answer ({_line(str(error), self._key)})")
                continue
            except httpx.HTTPError as error:
                failure, said = "failed", f"broke off ({type(error).__name__})"
                continue
            seconds = time.perf_counter() - begun
            if response.status_code == 200:
                if (answer := _read(response, self.model, seconds)) is not None:
                    self._in_a_row = 0
                    self._count("answered")
                    return answer
                failure, said = "failed", "did not answer in OpenAI's shape"
                break
            failure, said = "failed", f"answered {response.status_code}{_reason(response, self._key)}"
            if response.status_code in (401, 403, 404) or 300 <= response.status_code < 400:
                self._give_up(f"{self.url} {said} when asked for {self.model}")
            if response.status_code in (429, 503):
                failure = "limited" if response.status_code == 429 else "failed"
                if (pause := retry_after(response.headers.get("retry-after", ""), 2 * pause)) > _LONGEST_WAIT:
                    said += f" and asks to wait {pause:.0f} s"
                    break
                self._not_before = max(self._not_before, time.monotonic() + pause)
            elif response.status_code < 500:  # a request that it will not take, such as one that is too long
                break
        self._count(failure)
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW:
            self._give_up(f"{self.url} failed {self._in_a_row} times in a row; the last time it {said}")
        return None

    def in_words(self, what: str) -> list[str]:
        """Sentences about the requests that failed, or had to be repeated; none when all went well."""
        found = []
        if failed := sum(self.counts[name] for name in _FAILURES):
            kinds = ", ".join(f"{self.counts[name]} {name.replace('_', ' ')}" for name in _FAILURES)
            found.append(f"{failed} of {failed + self.counts['answered']} requests to {what} have no answer ({kinds}).")
        if self.counts["tried_again"]:
            times = self.counts["tried_again"]
            found.append(f"Requests to {what} were tried again {times} time{'s' if times > 1 else ''}.")
        return found

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _give_up(self, why: str) -> None:
        self._given_up = why
        raise Unavailable(why)


def _key(variable: str | None) -> str | None:
    try:
        return read_key(variable)
    except ValueError as error:
        raise Unavailable(str(error)) from None


def _read(response: httpx.Response, model: str, seconds: float) -> Said | None:
    try:
        value = response.json()
        choice = value["choices"][0]
        message = choice["message"]
        text = message.get("content")
        usage = value.get("usage") or {}
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    prompt, completion = (t if isinstance(t, int) and t >= 0 else None for t in tokens)
    named = value.get("model")
    return Said(
        text=(text or "").replace("\0", "�"),  # which the database cannot hold
        model=named if isinstance(named, str) and named else model,
        seconds=seconds,
        prompt_tokens=prompt,
        completion_tokens=completion,
        finish_reason=ended if isinstance(ended := choice.get("finish_reason"), str) else None,
    )


def _reason(response: httpx.Response, key: str | None) -> str:
    """What the address said itself, in brackets; not of a refused key, which such messages tend to repeat."""
    if response.status_code in (401, 403):
        return " (the key is refused)"
    try:
        error = response.json()["error"]
        said = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        return ""
    return f" ({_line(said, key)})" if isinstance(said, str) and said else ""


def _line(text: str, key: str | None) -> str:
    """Foreign text as a part of one of our sentences, without the key."""
    flat = " ".join((text.replace(key, "***") if key else text).split())
    return flat[:_QUOTED].rstrip(".")
