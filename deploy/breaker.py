"""A circuit breaker for each address that answers are had from: one that keeps failing is left alone for a while.

The pattern is Nygard's ("Release It!"): closed, open after failures in a row, and once its time is over one request
tries it again (half-open); when that one fails too, it stays open twice as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

FAILURES = 5  # in a row
SHORTEST, LONGEST = 1.0, 30.0  # seconds
State = Literal["closed", "open", "half-open"]


class Breaker:
    """One address; belongs to one event loop."""

    def __init__(self, *, longest: float = LONGEST, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._longest = clock, longest
        self._failures = 0
        self._wait = SHORTEST
        self._until = 0.0  # open until then; 0: closed
        self._tries = False  # whether a request is on its way to see if it is well again
        self._paused = 0.0  # the address itself asked for none until then

    @property
    def state(self) -> State:
        if not self._until:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    @property
    def seconds(self) -> float:
        """Until the next request may go there; 0: now."""
        return max(0.0, max(self._until, self._paused) - self._clock())

    def admit(self) -> bool:
        """Whether a request may go there now. The one that is let through when the time is over is the only one until
        it is known what became of it, or as much time has gone again."""
        if self.seconds > 0:
            return False
        if self._until:
            self._tries = True
            self._until = self._clock() + self._wait
        return True

    def succeeded(self) -> None:
        self._failures, self._wait, self._until, self._tries = 0, SHORTEST, 0.0, False

    def failed(self) -> None:
        """A request failed by the place's own fault. Of many that were under way when it opened only the one that tries
        it later counts."""
        if self._tries:
            self._tries = False
            self._wait = min(self._longest, 2 * self._wait)
            self._until = self._clock() + self._wait
        elif not self._until:
            self._failures += 1
            if self._failures >= FAILURES:
                self._until = self._clock() + self._wait

    def pause(self, seconds: float) -> None:
        """Send none for so long: it is up, but has had enough."""
        self._paused = max(self._paused, self._clock() + min(seconds, LONGEST))
