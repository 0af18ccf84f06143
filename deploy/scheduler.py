"""The thread that owns the model: takes requests from the event loop, steps the batch, hands pieces back.

The event loop never waits for it, and nobody else touches the model.

Of requests that wait the lowest priority number is begun first, in the order of their arrival. Those above 0 are
background: each row in a batch makes every step longer, so they are decoded only while no other request waits or
decodes, and are set aside when one comes, which waits for the step or the short pass (`Batch.join_shortly`) under way,
and for what is set aside to be copied out. While others keep the engine busy they stand still, and it is for their
senders to give them up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from deploy.adapters import Adapters
from deploy.decoding import Batch, Finish, Request, Row
from infra.errors import TunesmithError, Unreachable

T = TypeVar("T")
log = logging.getLogger(__name__)

# Background requests may wait beside the queue, a quarter as many as in it
_BACKGROUND_PART = 4
# Prompts that run between two steps, and their tokens (one prompt may be longer): those already decoding wait for few.
JOINS_A_STEP = 8
JOIN_TOKENS = 1024


class Full(TunesmithError):
    """The queue is at its bound."""

    http_status: ClassVar[int] = 429
    code: ClassVar[str] = "engine_full"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one step added to one row: text that can be shown, and the tokens with their log-probabilities."""

    index: int
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    tops: Sequence[list[tuple[int, float]]]
    finish: Finish | None


class Ticket:
    """One client's request: its rows (one a choice), and the queue in which their pieces arrive on `loop`."""

    def __init__(self, rows: Sequence[Row], loop: asyncio.AbstractEventLoop) -> None:
        self.rows, self.loop = list(rows), loop
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._told = [0] * len(self.rows)  # tokens of each row that were handed out

    def news(self, index: int) -> Piece:
        """Take what is new about a row; called by the model's thread."""
        row, told = self.rows[index], self._told[index]
        self._told[index] = len(row.tokens)
        return Piece(
            index=index,
            text=row.text.take(),
            tokens=row.tokens[told:],
            logprobs=row.logprobs[told:],
            tops=row.tops[told:],
            finish=row.finish,
        )


class Scheduler(threading.Thread):
    """By priority, then first come, first served, into one `Batch`. `submit`, `cancel`, `call` and `stop` may be used
    by any thread."""

    def __init__(self, model: Any, tokenizer: Any, adapters: Adapters, *, max_rows: int, max_cells: int, queue: int):
        super().__init__(name="model", daemon=True)
        self.adapters, self.queue = adapters, queue
        self._new_batch: Callable[[], Batch] = lambda: Batch(
            model, tokenizer, adapters, max_rows=max_rows, max_cells=max_cells
        )
        self._batch = self._new_batch()
        self._changed = threading.Condition()
        self._waiting: list[tuple[Ticket, int]] = []  # by priority
        self._aside: deque[tuple[Ticket, int]] = deque()  # background rows that have begun, and made way
        self._places: dict[Row, tuple[Ticket, int]] = {}  # rows in the batch
        self._calls: list[Callable[[], None]] = []
        self._stopping = False
        self.busy_seconds = 0.0
        self.steps = 0
        self.finished: list[Callable[[Row], None]] = []  # told of each row that ends, in the model's thread

    # ------------------------------------------------------------ for any thread

    @property
    def waiting(self) -> int:
        """How many wait that are not background."""
        with self._changed:
            return len(self._waiting) - self._waiting_background()

    @property
    def background(self) -> int:
        """How many background requests wait, those that made way included."""
        with self._changed:
            return self._waiting_background() + len(self._aside)

    @property
    def running(self) -> int:
        return len(self._places)

    def submit(self, requests: Sequence[Request], loop: asyncio.AbstractEventLoop) -> Ticket:
        """Queue one client's requests; their pieces arrive in the ticket's queue until each has a finish.

        Raises NotFound for an unknown adapter, UsageError for what can never fit, Full at the queue's bound; background
        requests have a bound of their own, and take nobody's place.
        """
        ticket = Ticket([self._batch.row(request) for request in requests], loop)
        with self._changed:
            self._check_room(len(requests), background=requests[0].background)
            for index in range(len(requests)):
                insort(self._waiting, (ticket, index), key=lambda item: _request(item).priority)
            self._changed.notify()
        return ticket

    def check_room(self, count: int, *, background: bool) -> None:
        """Raises Full, or Unreachable, where so many requests would not be taken now."""
        with self._changed:
            self._check_room(count, background=background)

    def _check_room(self, count: int, *, background: bool) -> None:
        if self._stopping or not self.is_alive():
            raise Unreachable("The engine is stopping.", hint="Try again in a few seconds.")
        behind = self._waiting_background()
        waiting, most, kind = len(self._waiting) - behind, self.queue, ""
        if background:
            waiting, most, kind = behind, max(1, self.queue // _BACKGROUND_PART), "background "
        if waiting + count > most:
            raise Full(f"{waiting} {kind}requests are waiting; {most} may.", hint="Try again soon.")

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants this any more: its rows leave, and their places are free. No more pieces come."""
        if any(row.finish is None for row in ticket.rows):
            self._between_steps(lambda: self._cancel(ticket))

    async def call(self, function: Callable[[], T]) -> T:
        """The function's result, run by the model's thread between two steps. Raises Unreachable when it has ended."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            try:
                result = function()
            except Exception as error:
                loop.call_soon_threadsafe(tell, None, error)
            else:
                loop.call_soon_threadsafe(tell, result, None)

        if not self._between_steps(run):
            raise Unreachable("The engine is stopping.", hint="Try again in a few seconds.")
        return await future

    def stop(self) -> None:
        """End the thread after the step under way; requests that are not done end with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.is_alive():
            self.join()

    def _waiting_background(self) -> int:
        return sum(_request(item).background for item in self._waiting)

    def _between_steps(self, function: Callable[[], None]) -> bool:
        with self._changed:
            if self._stopping:
                return False
            self._calls.append(function)
            self._changed.notify()
        return True

    # ------------------------------------------------------------ the model's thread

    def run(self) -> None:
        import torch

        torch.set_num_threads(1)
        try:
            while self._turn():
                pass
        finally:
            self._fail_all()

    def _turn(self) -> bool:
        with self._changed:
            while not (self._calls or self._waiting or self._aside or self._places or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            calls, self._calls = self._calls, []
        for function in calls:
            function()
        started = time.perf_counter()
        moved: list[Row] = []
        try:
            if self._others():
                self._make_way()
                while len(moved) < JOINS_A_STEP and (joining := self._next(moved)) is not None:
                    moved.append(self._place(joining))
                self._batch.join(*moved)
                self._publish(dict.fromkeys(moved))  # first tokens do not wait for everybody's next
                moved = self._batch.step()
            elif (joining := self._next_background()) is not None:
                row = self._place(joining)
                if self._batch.join_shortly(row):
                    moved.append(row)
                else:
                    self._aside.appendleft(self._places.pop(row))
            else:
                moved += self._batch.step()
        except Exception:
            log.exception("a step failed; the requests in it are given up")
            self._batch, places = self._new_batch(), list(self._places)
            for row in places:
                row.end("error")
            moved = places
        self.steps += 1
        self.busy_seconds += time.perf_counter() - started
        self._publish(dict.fromkeys(moved))
        return True

    def _others(self) -> bool:
        """Whether any request waits or decodes that is not background."""
        with self._changed:
            first = self._waiting[:1]
        return any(not _request(item).background for item in (*first, *self._places.values()))

    def _make_way(self) -> None:
        """Set the background rows of the batch aside."""
        rows = [row for row in self._batch.rows if row.request.background]
        if rows:
            self._batch.set_aside(rows)
            self._aside.extend(self._places.pop(row) for row in rows)

    def _place(self, joining: tuple[Ticket, int]) -> Row:
        row = joining[0].rows[joining[1]]
        self._places[row] = joining
        return row

    def _next_background(self) -> tuple[Ticket, int] | None:
        """Whoever made way goes on first: together they had places. Then the first in the queue, if there is one."""
        if self._aside:
            return self._aside.popleft()
        with self._changed:
            if not self._waiting:
                return None
            ticket, index = self._waiting[0]
            row = ticket.rows[index]
            # One that came a moment ago and is not background waits for the next turn
            if not row.request.background or not self._batch.fits(row):
                return None
            return self._waiting.pop(0)

    def _next(self, beside: Sequence[Row]) -> tuple[Ticket, int] | None:
        """The first in the queue, if there is a place for it beside those that join with it."""
        with self._changed:
            if not self._waiting:
                return None
            ticket, index = self._waiting[0]
            row = ticket.rows[index]
            tokens = sum(len(joining.request.prompt) for joining in (*beside, row))
            if row.request.background or (beside and tokens > JOIN_TOKENS) or not self._batch.fits(row, beside):
                return None
            return self._waiting.pop(0)

    def _publish(self, rows: dict[Row, None]) -> None:
        """Hand each row's news to its event loop, in one call a loop."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Piece]]] = {}
        for row in rows:
            ticket, index = self._places[row]
            news.setdefault(ticket.loop, []).append((ticket, ticket.news(index)))
            if row.finish is not None:
                self._over(row)
        for loop, pieces in news.items():
            try:
                loop.call_soon_threadsafe(_deliver, pieces)
            except RuntimeError:  # the loop is closed: nobody listens any more
                log.info("pieces for a closed event loop were dropped")

    def _over(self, row: Row) -> None:
        self._places.pop(row, None)
        for told in self.finished:
            told(row)

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._waiting = [item for item in self._waiting if item[0] is not ticket]
            self._aside = deque(item for item in self._aside if item[0] is not ticket)
        for row in ticket.rows:
            if row.finish is None:
                self._batch.cancel(row)
                self._over(row)

    def _fail_all(self) -> None:
        with self._changed:
            self._stopping = True
            left, calls = [*self._waiting, *self._aside], self._calls
            self._waiting.clear()
            self._aside.clear()
        for function in calls:
            function()
        for ticket, index in left:
            self._places[ticket.rows[index]] = (ticket, index)
        for row in self._places:
            row.end("error")
        self._publish(dict.fromkeys(self._places))


def _request(item: tuple[Ticket, int]) -> Request:
    ticket, index = item
    return ticket.rows[index].request


def _deliver(pieces: list[tuple[Ticket, Piece]]) -> None:
    for ticket, piece in pieces:
        ticket.pieces.put_nowait(piece)
