"""Follows the deployment rows, so that this gateway serves what they say, and only what is ready.

A change is heard by LISTEN, and by looking once a second in case that is lost. A version counts as ready when its
bundle was verified, an engine of exactly its base holds its adapter, and a first request was answered; only then
does the pointer flip, by replacing one object. Until then, and when it never becomes ready, the old version goes
on serving. The version that a rollback would bring back is kept loaded too, so a rollback is a flip as well.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg

from deploy.routing import Place, Route, Served, Table
from deploy.upstream import Busy, Upstream
from infra.db import connect, load_queries, transaction
from infra.errors import NoModel, NotFound, TunesmithError, Unreachable
from infra.settings import Settings
from infra.storage import get as stored
from registry import signatures
from registry.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Hosted, verify
from registry.deployments import standing
from registry.pricing import Price, in_force
from registry.profile import Extractor, Profile
from registry.upstreams import Upstream as Address
from registry.upstreams import every as addresses

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
REPORT_SECONDS = 5.0
RETRY_SECONDS = 2.0  # after a version failed to become ready; doubles up to a minute
STALE_SECONDS = 10.0
_LEAVE_SECONDS = 2.0  # for the database to hear that this gateway ends
_PASSING = (NotFound, Unreachable, Busy)  # what is not there now may be there any moment
IDLE_VERSIONS = 16  # loaded versions beyond those in slots
Ref = tuple[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """One deployment row, and the version that a rollback would bring back."""

    model: str
    generation: int
    champion: int | None
    challenger: int | None
    challenger_share: float
    shadow: int | None
    previous: int | None
    monitoring: Mapping[str, Any]

    @property
    def numbers(self) -> list[int]:
        """What must be loaded, the most urgent first."""
        return [n for n in (self.champion, self.challenger, self.shadow, self.previous) if n is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    id: uuid.UUID
    base_digest: str
    url: str


@dataclass(kw_only=True, slots=True)
class _Failure:
    error: TunesmithError
    again_at: float
    wait: float


class Follower:
    """Keeps `table` true. Belongs to the event loop that runs `run`; reading `table` is safe anywhere."""

    def __init__(self, settings: Settings, upstream: Upstream, replica: uuid.UUID) -> None:
        self.settings = settings
        self.upstream = upstream
        self.replica = replica
        self.table = Table()
        self.synced = False
        self.read_at = time.monotonic()  # when the deployments were last read
        self.waiting: set[str] = set()  # models of which nothing answers yet, and nothing is known to be broken
        self.begun = False  # whether all there is to serve was served once
        self.applied: dict[str, tuple[int, bool, str]] = {}  # model -> generation, ready, message
        self._versions: dict[Ref, Served] = {}  # verified; the least recently needed or used first
        self._loaded: dict[uuid.UUID, set[Ref]] = {}  # what each engine answered a first request of
        self._engines: tuple[Engine, ...] = ()
        self._stale: dict[uuid.UUID, float] = {}  # since when we have seen an engine's row stale
        self._upstreams: Mapping[str, Address] = {}
        self._answered: set[Ref] = set()  # hosted versions that answered a first request
        self._failures: dict[Ref, _Failure] = {}
        self._previous: dict[str, tuple[int, int | None]] = {}  # model -> generation, rollback's target
        self._warming: dict[Ref, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="follower")
        # Not asyncio's own threads, in which names are looked up too: a database that is away would hold up both
        self._checking = ThreadPoolExecutor(2, thread_name_prefix="versions")
        self._reported: dict[str, tuple[int, bool, str]] = {}
        self._report_at = 0.0

    async def run(self) -> None:
        """Follow until cancelled. A database that is away changes nothing: what serves goes on serving."""
        loop = asyncio.get_running_loop()
        listener = threading.Thread(target=self._listen, args=(loop,), name="listener", daemon=True)
        listener.start()
        silent = False
        try:
            while True:
                self._changed.clear()
                try:
                    wishes, self._engines, upstreams = await loop.run_in_executor(self._thread, self._read)
                    self._set_upstreams(upstreams)
                    self._apply(wishes)
                    self.synced, self.read_at = True, time.monotonic()
                    await loop.run_in_executor(self._thread, self._report)
                    silent = False
                except (TunesmithError, psycopg.Error, OSError) as error:
                    if not silent:
                        log.warning("deployments cannot be followed for now: %s", str(error).strip())
                    silent = True
                except Exception:  # whatever it is, following goes on with the next turn
                    log.exception("deployments could not be followed")
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):  # wait_for may swallow a cancellation before Python 3.12
                        await self._changed.wait()
        finally:
            self._stopping.set()
            for task in self._warming.values():
                task.cancel()
            leaving = loop.run_in_executor(self._thread, self._leave)
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(leaving), _LEAVE_SECONDS)
            for pool in (self._thread, self._checking):
                pool.shutdown(wait=False, cancel_futures=True)

    def used(self, served: Served) -> None:
        """A request was answered by it, so it is not idle; of versions in no slot the busy ones stay longest."""
        ref = (served.model, served.number)
        if ref in self._versions:
            self._versions[ref] = self._versions.pop(ref)

    async def warm(self, model: str, number: int) -> Served:
        """A version that no slot needs, ready to answer. Raises NotFound, Refused, Unreachable, BadAnswer."""
        ref = (model, number)
        if signatures.demanded():
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._checking, _demand_signature, model, number)
        for _ in range(2):  # it may just be let go of
            self._start_warming(ref)
            if task := self._warming.get(ref):
                await asyncio.shield(task)
            if served := self.table.resident.get(ref):
                return served
        if failure := self._failures.get(ref):
            raise failure.error
        raise Unreachable(f"No engine runs for the base of {model}:{number}.", hint="`tunesmith status` shows them.")

    # ------------------------------------------------------------ reading

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread that wakes the loop at each NOTIFY. It holds one connection and makes a new one when it is lost."""
        while not self._stopping.is_set():
            try:
                with connect(autocommit=True) as conn:
                    conn.execute("listen tunesmith_deployment")
                    while not self._stopping.is_set():
                        for _ in conn.notifies(timeout=POLL_SECONDS, stop_after=1):
                            loop.call_soon_threadsafe(self._changed.set)
            except (TunesmithError, psycopg.Error, OSError):
                self._stopping.wait(POLL_SECONDS)
            except RuntimeError:
                return  # the loop is closed
            except Exception:  # whatever it is, who looks once a second must not become the only one
                log.exception("changes cannot be heard for now")
                self._stopping.wait(POLL_SECONDS)

    def _read(self) -> tuple[list[Wish], tuple[Engine, ...], Mapping[str, Address]]:
        with transaction() as conn:
            wishes = []
            for row in conn.execute(SQL["deployments"]).fetchall():
                model, generation = row["model"], row["generation"]
                if self._previous.get(model, (-1, None))[0] != generation:
                    changes = conn.execute(SQL["champions"], {"model": model}).fetchall()
                    stood = standing((change["action"], change["to_version"]) for change in changes)
                    self._previous[model] = generation, stood[-2] if len(stood) > 1 else None
                row["monitoring"] = row["monitoring"] or {}
                wishes.append(Wish(previous=self._previous[model][1], **row))
            engines = self._alive(conn.execute(SQL["engines"]).fetchall())
            upstreams = addresses(conn)
        return wishes, engines, upstreams

    def _alive(self, rows: Iterable[dict[str, Any]]) -> tuple[Engine, ...]:
        """The engines whose rows are fresh, and those that we know whose rows became stale only a moment ago: while
        the database was away engines could not write, and are not dead for that."""
        now, known = time.monotonic(), {engine.id for engine in self._engines}
        alive, stale = [], {}
        for row in rows:
            fresh = row.pop("fresh")
            if not fresh:
                stale[row["id"]] = self._stale.get(row["id"], now)
            if fresh or (row["id"] in known and now - stale[row["id"]] < STALE_SECONDS):
                alive.append(Engine(**row))
        self._stale = stale
        return tuple(alive)

    def _report(self) -> None:
        """Tell the database what this gateway serves: at once when it changed, else every few seconds."""
        now = time.monotonic()
        if self.applied == self._reported and now < self._report_at:
            return
        with transaction() as conn:
            if not self._report_at:  # the first time: gateways that went stay no longer than a day beyond the next
                conn.execute(SQL["forget_replicas"])
            for model, (generation, ready, message) in sorted(self.applied.items()):
                conn.execute(
                    SQL["report"],
                    {
                        "id": self.replica,
                        "model": model,
                        "generation": generation,
                        "ready": ready,
                        "message": message,
                    },
                )
        self._reported, self._report_at = dict(self.applied), now + REPORT_SECONDS

    def _leave(self) -> None:
        with suppress(TunesmithError, psycopg.Error, OSError), transaction() as conn:
            conn.execute(SQL["leave"], {"id": self.replica})

    # ------------------------------------------------------------ applying

    def _apply(self, wishes: Sequence[Wish]) -> None:
        """Flip to what is ready, and start to make the rest ready."""
        alive = {engine.id for engine in self._engines}
        self._loaded = {engine: refs for engine, refs in self._loaded.items() if engine in alive}
        routes = {}
        needed: dict[Ref, None] = {}
        self._set_monitoring({wish.model: wish for wish in wishes})
        for wish in wishes:
            needed.update(dict.fromkeys((wish.model, number) for number in wish.numbers))
            old = self.table.routes.get(wish.model)
            if old is not None and old.champion is not None:  # it serves until the new one is ready
                needed.setdefault((wish.model, old.champion.number))
            routes[wish.model] = self._route(wish)
        for ref in needed:
            if ref in self._versions:
                self._versions[ref] = self._versions.pop(ref)  # most recently needed last
        self._let_go(needed)
        self._publish(routes)
        for ref in needed:
            self._start_warming(ref)

    def _route(self, wish: Wish) -> Route:
        old = self.table.routes.get(wish.model, Route(model=wish.model, generation=0))
        missing = []

        def ready(number: int | None, before: Served | None) -> Served | None:
            if number is None:
                return None
            served = self._versions.get((wish.model, number))
            # A version that serves already stays, even while no engine lives: the next one will load it.
            if served is not None and (self._is_loaded(served) or (before and before.number == number)):
                return served
            failure = self._failures.get((wish.model, number))
            why = f": {failure.error.message}" if failure else ""
            missing.append(f"{wish.model}:{number} is not ready{why}")
            return None

        champion = ready(wish.champion, old.champion)
        challenger = ready(wish.challenger, old.challenger)
        shadow = ready(wish.shadow, old.shadow)
        message = "; ".join(missing)
        self.applied[wish.model] = (wish.generation if not missing else old.generation, not missing, message)
        self.waiting.discard(wish.model)
        if champion is None and wish.champion is not None:
            failure = self._failures.get((wish.model, wish.champion))
            if old.champion is not None:  # with what is recorded and paid now, which may have changed since
                champion = self._versions.get((wish.model, old.champion.number), old.champion)
            elif failure is None or isinstance(failure.error, _PASSING):
                self.waiting.add(wish.model)
            else:  # this gateway began after it was promoted: what a rollback would bring back is the old one
                champion = ready(wish.previous, None)
                failure = self._failures.get((wish.model, wish.previous)) if wish.previous is not None else failure
                if champion is None and (failure is None or isinstance(failure.error, _PASSING)):
                    self.waiting.add(wish.model)
        return Route(
            model=wish.model,
            generation=self.applied[wish.model][0],
            champion=champion,
            challenger=challenger,
            share=wish.challenger_share if challenger else 0.0,
            shadow=shadow,
            message=message,
        )

    def _publish(self, routes: Mapping[str, Route]) -> None:
        engines: dict[str, tuple[str, ...]] = {}
        for engine in self._engines:
            engines[engine.base_digest] = (*engines.get(engine.base_digest, ()), engine.url)
        resident = {ref: served for ref, served in self._versions.items() if self._is_loaded(served)}
        holders = {
            ref: tuple(engine.url for engine in self._engines if ref in self._loaded.get(engine.id, ()))
            for ref in resident
        }
        self.table = Table(
            routes=routes, resident=resident, engines=engines, holders=holders, upstreams=self._upstreams
        )
        self.upstream.engines_alive([engine.url for engine in self._engines])

    def _is_loaded(self, served: Served) -> bool:
        ref = served.model, served.number
        return ref in self._answered or any(ref in refs for refs in self._loaded.values())

    def _set_upstreams(self, upstreams: Mapping[str, Address]) -> None:
        """Where one was mended, what failed is tried again at once."""
        if upstreams != self._upstreams:
            changed = {
                name for name in upstreams.keys() | self._upstreams if upstreams.get(name) != self._upstreams.get(name)
            }
            self.upstream.forget(changed)
            for failure in self._failures.values():
                failure.again_at, failure.wait = 0.0, RETRY_SECONDS / 2
        self._upstreams = upstreams

    def _set_monitoring(self, wishes: Mapping[str, Wish]) -> None:
        """A model's price and text settings change without a new version."""
        for ref, served in list(self._versions.items()):
            if (wish := wishes.get(ref[0])) is not None:
                price, keep_text = self._monitoring(wish.monitoring, served.hosted)
                if (price, keep_text) != (served.price, served.keep_text):
                    self._versions[ref] = replace(served, price=price, keep_text=keep_text)

    def _monitoring(self, monitoring: Mapping[str, Any], hosted: Hosted | None) -> tuple[Price, bool]:
        """What a version's requests cost, and whether their text is kept; a hosted model has a price of its own."""
        price: Price = in_force(monitoring, self.settings.machine_usd_per_hour)
        if hosted is not None and hosted.price is not None:
            price = hosted.price
        return price, bool(monitoring.get("keep_text", False))

    # ------------------------------------------------------------ warming

    def _start_warming(self, ref: Ref) -> None:
        failure = self._failures.get(ref)
        if ref in self._warming or (failure and time.monotonic() < failure.again_at):
            return
        served = self._versions.get(ref)
        if served is not None and served.hosted is None:
            if all(ref in self._loaded.get(engine.id, ()) for engine in self._of_base(served)):
                return  # on all its engines, or there is none to load it
        elif ref in self._answered:
            return

        async def make_ready() -> None:
            try:
                if ref not in self._versions:
                    # Not in this loop's own thread: reading a bundle takes a while.
                    loop = asyncio.get_running_loop()
                    self._versions[ref] = await loop.run_in_executor(self._checking, self._check, ref)
                await self._load(ref)
                self._failures.pop(ref, None)
                self._publish(self.table.routes)
            except (TunesmithError, OSError, ValueError) as error:
                known = self._failures.get(ref)
                self._fail(ref, error if isinstance(error, TunesmithError) else TunesmithError(str(error)))
                # It is tried again within moments: each reason is told once
                again = known is not None and known.error.message == self._failures[ref].error.message
                log.log(logging.DEBUG if again else logging.WARNING, "%s:%d is not ready: %s", *ref, error)
            except Exception:
                self._fail(ref, TunesmithError("An unexpected error; see the gateway's log."))
                log.exception("%s:%d is not ready", *ref)
            finally:
                del self._warming[ref]
                self._changed.set()

        self._warming[ref] = asyncio.create_task(make_ready())

    def _check(self, ref: Ref) -> Served:
        model, number = ref
        with transaction() as conn:
            row = conn.execute(SQL["version"], {"model": model, "number": number}).fetchone()
            settings = conn.execute(SQL["monitoring"], {"model": model}).fetchone()
        if row is None:
            raise NoModel(f"There is no version {model}:{number}.", hint="See GET /api/v1/models.")
        folder = stored("bundle", row["bundle_digest"])
        manifest = verify(folder, row["bundle_digest"])
        adapter = ADAPTER_WEIGHTS in manifest.files
        price, keep_text = self._monitoring((settings or {}).get("monitoring") or {}, manifest.hosted)
        return Served(
            model=model,
            number=number,
            base_digest=manifest.base.digest,
            adapter=f"{model}-v{number}" if adapter else "base",
            adapter_path=str(folder / "adapter") if adapter else None,
            system=manifest.prompt.system,
            generation=manifest.generation.model_dump(),
            extractor=Extractor(Profile.from_json(row["profile"]) if row["profile"] else Profile(histograms={})),
            price=price,
            keep_text=keep_text,
            created=row["created"],
            hosted=manifest.hosted,
            digests={name.removeprefix("adapter/"): manifest.files[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
            if adapter
            else {},
        )

    async def _load(self, ref: Ref) -> None:
        """Load a version into every engine of its base that lacks it, all at once, so that a sick one holds up none of
        the others; a hosted one has only to answer. Raises what the first of them failed by, Unreachable when there is
        none."""
        served = self._versions[ref]
        if served.hosted:
            await self.upstream.try_out(replace(self.table, upstreams=self._upstreams).places(served), served)
            self._answered.add(ref)
            log.info("%s is ready", served.name)
            return
        engines = self._of_base(served)
        if not engines:
            raise Unreachable(f"No engine runs for the base {served.base_digest[:19]} of {served.name}.")

        async def into(engine: Engine) -> None:
            await self.upstream.load(engine.url, served)
            await self.upstream.try_out([Place(name=engine.url, url=engine.url, model=served.adapter)], served)
            self._loaded.setdefault(engine.id, set()).add(ref)
            self._changed.set()
            log.info("%s is ready in the engine at %s", served.name, engine.url)

        lacking = [engine for engine in engines if ref not in self._loaded.get(engine.id, ())]
        for failed in await asyncio.gather(*map(into, lacking), return_exceptions=True):
            if failed is not None:
                raise failed

    def _of_base(self, served: Served) -> list[Engine]:
        return [engine for engine in self._engines if engine.base_digest == served.base_digest]

    def _fail(self, ref: Ref, error: TunesmithError) -> None:
        before = self._failures.pop(ref, None)
        wait = min(60.0, before.wait * 2) if before else RETRY_SECONDS
        if isinstance(error, _PASSING):
            wait = max(POLL_SECONDS, float(error.retry_after) if isinstance(error, Busy) else 0.0)
        self._failures[ref] = _Failure(error=error, again_at=time.monotonic() + wait, wait=wait)
        while len(self._failures) > 1000:
            del self._failures[next(iter(self._failures))]

    def _let_go(self, needed: Iterable[Ref]) -> None:
        """Unload the versions that have been idle longest, beyond a number that may stay."""
        keep = set(needed)
        idle = [ref for ref in self._versions if ref not in keep and ref not in self._warming]
        for ref in idle[: max(0, len(idle) - IDLE_VERSIONS)]:
            served = self._versions.pop(ref)
            self._answered.discard(ref)
            holders = [engine.url for engine in self._engines if ref in self._loaded.get(engine.id, ())]
            for refs in self._loaded.values():
                refs.discard(ref)
            if served.adapter_path is not None:
                self._warming[ref] = asyncio.create_task(self._unload(ref, served, holders))

    async def _unload(self, ref: Ref, served: Served, engines: Sequence[str]) -> None:
        try:
            for engine in engines:
                await self.upstream.unload(engine, served.adapter)
        except TunesmithError as error:
            log.warning("%s could not be unloaded: %s", served.name, error)
        finally:
            del self._warming[ref]


def _demand_signature(model: str, number: int) -> None:
    """Of a version that somebody asks for by its number; what holds a slot was asked when it got that."""
    with transaction() as conn:
        row = conn.execute(SQL["version"], {"model": model, "number": number}).fetchone()
    if row is not None:
        signatures.demand(f"{model}:{number}", stored("bundle", row["bundle_digest"]))
