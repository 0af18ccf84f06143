"""What keys and models may use: requests and tokens a minute, dollars a day and a month, over all gateways together;
and how many requests they may have under way at each gateway.

What is used stands in the database, a row for each limit and span (a UTC minute, day or month by its clock). A gateway
takes a part of a limit in advance, so that most requests wait for nobody; what all gateways took is never more than
the limit. Tokens and money are known when an answer is over: a request begins while something is left, and what answers
under way use beyond that is taken from what comes next. While the database is away each gateway counts by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import psycopg

from infra.db import Connection, load_queries, one, transaction
from infra.errors import NotFound, TunesmithError, UsageError

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

Scope = Literal["key", "model"]
Kind = Literal["requests", "tokens", "usd", "usd_month", "concurrent"]
Unit = Literal["minute", "day", "month"]
UNITS: Mapping[Kind, Unit] = {"requests": "minute", "tokens": "minute", "usd": "day", "usd_month": "month"}
_PARTS = 20  # of a limit, taken at a time; of what little is left less, or gateways would refuse what others hold
_LEAST_PART = 0.001
_LOOK_AGAIN_SECONDS = 30.0
_REFRESH_SECONDS = 1.0
_WAIT_SECONDS = 1.0  # for the database, on a request's way; then it counts as away


class OverLimit(TunesmithError):
    """A key or a model has used what it may."""

    http_status: ClassVar[int] = 429
    code: ClassVar[str] = "rate_limit_exceeded"

    def __init__(self, limit: Limit, seconds: float) -> None:
        self.retry_after = max(1, math.ceil(seconds))
        whose = "This key" if limit.scope == "key" else f"The model {limit.name}"
        has = "has as many under way as it may" if limit.kind == "concurrent" else "has used its limit"
        super().__init__(
            f"{whose} {has}: {limit.in_words}.",
            hint=f"Try again in {_in_words(self.retry_after)}, or ask an admin: `tunesmith limit`.",
        )


def _in_words(seconds: int) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{math.ceil(seconds / length)} {unit}"
    return f"{seconds} s"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """So much of a kind in each of its spans."""

    scope: Scope
    name: str
    kind: Kind
    amount: float

    @property
    def unit(self) -> Unit:
        return UNITS[self.kind]

    @property
    def in_words(self) -> str:
        if self.kind == "concurrent":
            return f"{self.amount:,.0f} requests at a time"
        if self.kind in ("usd", "usd_month"):
            return f"${self.amount:g} a {self.unit}"
        return f"{self.amount:,.0f} {self.kind} a {self.unit}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scope, self.name, self.kind


@dataclass(kw_only=True)
class _Purse:
    """What a gateway has of a limit: `left` of what it took for the span that ends at `ends`, below zero where answers
    used more; `owed` was used while the database was away. `empty`: nothing is left of the span for anybody."""

    limit: Limit
    left: float = 0.0
    owed: float = 0.0  # of this span
    used: float = 0.0  # of all gateways, when it was last looked at
    ends: float = 0.0
    empty: bool = False
    again: float = 0.0  # when to look whether another gateway has given something back
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # What the database was asked for, and has not given yet
    grant: asyncio.Future[tuple[float, float, float]] | None = None

    def roll_over(self, now: float) -> None:
        if now >= self.ends:
            self.left, self.owed, self.empty, self.used = min(self.left, 0.0), 0.0, False, 0.0
        elif self.empty and now >= self.again:
            self.empty = False


class Budgets:
    """The limits in memory; one a gateway, and belongs to its event loop. Where there are none it costs nothing."""

    def __init__(self) -> None:
        self._purses: dict[tuple[str, str, str], _Purse] = {}
        self._at_once: dict[tuple[str, str], Limit] = {}
        # A thread of its own: a database that hangs must not use up the threads that others wait for
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budgets")

    async def run(self) -> None:
        """Keep the limits fresh until cancelled; the last ones stay while the database is away."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._set(await loop.run_in_executor(self._thread, _read))
            except (TunesmithError, psycopg.Error, OSError) as error:
                log.debug("limits cannot be read: %s", error)
            except Exception:
                log.exception("limits could not be read")
            await asyncio.sleep(_REFRESH_SECONDS)

    async def close(self) -> None:
        """Give back what was taken and not used, and tell what was used beyond it."""
        if asked := [purse.grant for purse in self._purses.values() if purse.grant is not None]:
            await asyncio.wait(asked, timeout=_WAIT_SECONDS)
        now = time.monotonic()
        known = [purse for purse in self._purses.values() if purse.grant is None and now < purse.ends]
        rest = [(purse.limit, purse.owed - purse.left) for purse in known]
        with contextlib.suppress(TunesmithError, psycopg.Error, OSError, TimeoutError):
            loop = asyncio.get_running_loop()
            for limit, back in rest:
                if not back:
                    continue
                given = loop.run_in_executor(self._thread, _grant, limit, back, 0.0)
                await asyncio.wait_for(given, _WAIT_SECONDS)

    def check_places(self, scope: Scope, name: str, taken: int) -> None:
        """Raises OverLimit where so many requests under way, of a key or a model at this gateway, are too many."""
        if (limit := self._at_once.get((scope, name))) is not None and taken > limit.amount:
            raise OverLimit(limit, 1)

    def _set(self, limits: list[Limit]) -> None:
        self._at_once = {(limit.scope, limit.name): limit for limit in limits if limit.kind == "concurrent"}
        limits = [limit for limit in limits if limit.kind in UNITS]
        there = {limit.key for limit in limits}
        for key in self._purses.keys() - there:
            del self._purses[key]
        for limit in limits:
            purse = self._purses.get(limit.key)
            if purse is None:
                self._purses[limit.key] = _Purse(limit=limit)
            elif purse.limit != limit:
                purse.limit, purse.empty = limit, False

    def _of(self, key_id: str, model: str, *, watched: bool = True) -> Iterator[_Purse]:
        """What is no traffic takes nothing of what a model's clients may ask, but costs as much."""
        for scope, name in (("key", key_id), ("model", model)):
            for kind in UNITS:
                if not watched and scope == "model" and kind in ("requests", "tokens"):
                    continue
                if (purse := self._purses.get((scope, name, kind))) is not None:
                    yield purse

    async def admit(self, key_id: str, model: str, *, watched: bool = True) -> None:
        """Count a request. Raises OverLimit, and counts it nowhere, where a limit of key or model is used up."""
        if not self._purses:
            return
        counted: list[_Purse] = []
        try:
            for purse in self._of(key_id, model, watched=watched):
                need = 1.0 if purse.limit.kind == "requests" else 0.0
                await self._ensure(purse, need)
                purse.left -= need
                counted += [purse] if need else []
        except OverLimit:
            for purse in counted:
                purse.left += 1.0
            raise

    def spend(self, key_id: str, model: str, *, tokens: int, usd: float, watched: bool = True) -> None:
        """Count what an answer used."""
        if not self._purses:
            return
        for purse in self._of(key_id, model, watched=watched):
            used = {"requests": 0.0, "tokens": float(tokens), "usd": usd, "usd_month": usd}
            purse.left -= used[purse.limit.kind]

    def spend_copy(self, model: str, usd: float) -> None:
        """Count what a copy cost that nobody asked for: the model's money, and nobody's requests."""
        for purse in self._of_money(model):
            purse.left -= usd

    def affords_copy(self, model: str) -> bool:
        """Whether there is money left for a copy, as far as is known here."""
        return not any(purse.empty for purse in self._of_money(model))

    def _of_money(self, model: str) -> Iterator[_Purse]:
        for kind in ("usd", "usd_month"):
            if (purse := self._purses.get(("model", model, kind))) is not None:
                yield purse

    def headers(self, key_id: str) -> tuple[tuple[bytes, bytes], ...]:
        """OpenAI's ``x-ratelimit-*`` of a key's own limits of requests and tokens."""
        found: list[tuple[bytes, bytes]] = []
        now = time.monotonic()
        for kind in ("requests", "tokens"):
            if (purse := self._purses.get(("key", key_id, kind))) is not None:
                left = max(0.0, purse.limit.amount - purse.used + purse.left)
                for name, value in (
                    ("limit", f"{purse.limit.amount:.0f}"),
                    ("remaining", f"{min(left, purse.limit.amount):.0f}"),
                    ("reset", f"{max(0.0, purse.ends - now):.0f}s"),
                ):
                    found.append((f"x-ratelimit-{name}-{kind}".encode(), value.encode()))
        return tuple(found)

    async def _ensure(self, purse: _Purse, need: float) -> None:
        """Have so much, or anything at all, left in a purse; take more of the limit where it is not."""

        def has() -> bool:
            purse.roll_over(time.monotonic())
            if purse.empty:
                raise OverLimit(purse.limit, purse.ends - time.monotonic())
            return purse.left >= need and purse.left > 0

        if has():
            return
        async with purse.lock:
            if has():  # somebody else took more while we waited
                return
            await self._take(purse, need)

    async def _take(self, purse: _Purse, need: float) -> None:
        limit = purse.limit
        debt, owed = max(0.0, -purse.left), purse.owed
        part = max(need, limit.amount / _PARTS)

        def told(grant: asyncio.Future[tuple[float, float, float]]) -> None:
            """What was owed is told and what was granted is ours, also when it comes late; answers spend meanwhile."""
            purse.grant = None
            if grant.cancelled() or grant.exception() is not None:
                return
            granted, used, seconds = grant.result()
            purse.left += debt + granted
            purse.owed, purse.used, purse.ends = max(0.0, purse.owed - owed), used, time.monotonic() + seconds
            purse.empty, purse.again = purse.left < need or purse.left <= 0, time.monotonic() + _LOOK_AGAIN_SECONDS

        try:
            if purse.grant is not None:  # what is owed is on its way, and must not be told twice
                raise TimeoutError("the database has not answered yet")
            grant = purse.grant = asyncio.get_running_loop().run_in_executor(
                self._thread, _grant, limit, debt + owed, part, need
            )
            grant.add_done_callback(told)
            await asyncio.wait_for(asyncio.shield(grant), _WAIT_SECONDS)
        except (TunesmithError, psycopg.Error, OSError, TimeoutError) as error:
            log.warning("limits are counted here alone: %s", str(error) or type(error).__name__)
            purse.ends = time.monotonic() + _rest(limit.unit, datetime.now(UTC))
            alone = max(0.0, min(part + debt, limit.amount - purse.owed))
            purse.owed += alone
            purse.left += alone
        if purse.left < need or purse.left <= 0:
            raise OverLimit(limit, purse.ends - time.monotonic())


def _rest(unit: Unit, now: datetime) -> float:
    """The seconds from now to the end of the span."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    ends = {
        "minute": now.replace(second=0, microsecond=0) + timedelta(minutes=1),
        "day": midnight + timedelta(days=1),
        "month": (midnight.replace(day=1) + timedelta(days=31)).replace(day=1),
    }
    return (ends[unit] - now).total_seconds()


def _read() -> list[Limit]:
    with transaction() as conn:
        return [Limit(**row) for row in conn.execute(SQL["all"])]


def _grant(limit: Limit, debt: float, part: float, need: float = 0.0) -> tuple[float, float, float]:
    """Take a part of what is left of the span, at most a quarter unless that is less than the `need`, after what is
    owed (below zero: given back): how much, what all have used then, and the seconds to the span's end."""
    values: dict[str, Any] = {"scope": limit.scope, "name": limit.name, "kind": limit.kind, "unit": limit.unit}
    with transaction() as conn:
        conn.execute(SQL["begin_span"], values)
        row = one(conn, SQL["look"], values | {"length": f"1 {limit.unit}"})
        used = float(row["used"]) + debt
        rest = limit.amount - used
        granted = max(0.0, min(part, rest, max(rest / 4, need, _LEAST_PART * limit.amount)))
        conn.execute(SQL["take"], values | {"taken": debt + granted})
        return granted, used + granted, max(0.0, float(row["seconds"]))


# ---------------------------------------------------------------- by hand


def parse_whose(text: str) -> tuple[Scope, str]:
    """``key:ID`` or ``model:NAME``. Raises UsageError."""
    scope, _, name = text.partition(":")
    if scope not in ("key", "model") or not name:
        raise UsageError(f"{text[:80]!a} is neither key:ID nor model:NAME.", hint="See `tunesmith keys list`.")
    return ("key" if scope == "key" else "model"), name


def limit(conn: Connection, scope: Scope, name: str, amounts: Mapping[Kind, float], *, actor: str) -> None:
    """Set limits, in force on all gateways within two seconds; kinds that are not named stay. Raises NotFound for no
    such key or model, UsageError for an amount below zero."""
    from registry import deployments

    if scope == "model":
        deployments.read(conn, name)
    elif conn.execute(SQL["known_key"], {"name": name}).fetchone() is None:
        raise NotFound(f"There is no key {name[:80]!a}.", hint="See `tunesmith keys list`.")
    for kind, amount in amounts.items():
        if not (math.isfinite(amount) and amount >= 0):
            raise UsageError(f"A limit of {kind} is a number from 0, not {amount:g}.")
        conn.execute(SQL["put"], {"scope": scope, "name": name, "kind": kind, "amount": amount, "actor": actor})


def unlimit(conn: Connection, scope: Scope, name: str) -> int:
    """Take all limits of a key or a model away; how many there were."""
    return conn.execute(SQL["remove"], {"scope": scope, "name": name}).rowcount


def listing(conn: Connection) -> list[dict[str, Any]]:
    """All limits, with what was taken of their span: scope, name, kind, amount, unit, used, actor, at, key_name."""
    return list(conn.execute(SQL["listing"]))


def drop_old(conn: Connection) -> None:
    """Forget spans that are long over."""
    conn.execute(SQL["drop_old"])
