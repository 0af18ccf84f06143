"""When is an address left alone, and for how long?"""

from __future__ import annotations

from deploy.breaker import FAILURES, LONGEST, SHORTEST, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _failing(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failed()


def test_failures_in_a_row_open_it_and_one_success_closes_it() -> None:
    breaker = Breaker(clock=Clock())
    _failing(breaker, FAILURES - 1)
    breaker.succeeded()
    _failing(breaker, FAILURES - 1)
    assert breaker.state == "closed"
    assert breaker.admit()
    breaker.failed()
    assert breaker.state == "open"
    assert not breaker.admit()
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.admit()


def test_one_request_at_a_time_tries_it_and_waits_grow() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    _failing(breaker, FAILURES)
    waits = []
    for _ in range(8):
        waits.append(breaker.seconds)
        clock.now += breaker.seconds
        assert breaker.state == "half-open"
        assert breaker.admit()
        assert not breaker.admit()  # another one, meanwhile
        breaker.failed()
    assert waits == [SHORTEST * 2**n if SHORTEST * 2**n < LONGEST else LONGEST for n in range(8)]
    clock.now += LONGEST
    assert breaker.admit()
    breaker.succeeded()
    _failing(breaker, FAILURES)
    assert breaker.seconds == SHORTEST  # what was is forgotten


def test_many_failures_at_once_count_as_one() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    _failing(breaker, 40)  # all under way when the first of them failed
    assert breaker.seconds == SHORTEST
    clock.now += SHORTEST
    _failing(breaker, 1)  # a late one; nobody has tried it since
    assert breaker.admit()


def test_who_tried_and_was_never_heard_of_again_blocks_it_no_longer_than_it_was_left_alone() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    _failing(breaker, FAILURES)
    clock.now += SHORTEST
    assert breaker.admit()
    clock.now += SHORTEST
    assert breaker.admit()


def test_an_address_that_asks_for_a_pause_has_one_without_being_called_sick() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    breaker.pause(7)
    assert breaker.state == "closed"
    assert not breaker.admit()
    assert breaker.seconds == 7
    clock.now += 7
    assert breaker.admit()
    breaker.pause(10**9)
    assert breaker.seconds == LONGEST
