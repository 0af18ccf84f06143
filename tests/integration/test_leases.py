"""One holder at a time on the database's clock, and none that comes back from the dead (faults 3 and 24)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from infra import db
from infra.db import one, transaction
from infra.errors import Conflict
from infra.settings import Settings
from registry import leases
from registry.leases import Keeper, Lease


def _acquire(holder: str, seconds: float = 60) -> Lease:
    with transaction() as conn:
        return leases.acquire(conn, "run:m", holder, seconds)


def _check(lease: Lease) -> None:
    with transaction() as conn:
        leases.check(conn, lease)


def _expire() -> None:
    with transaction() as conn:
        conn.execute("update lease set expires_at = clock_timestamp()")


def test_a_held_lease_names_its_holder_and_a_free_one_gets_a_new_token(database: Settings) -> None:
    first = _acquire("host:1 train")
    with pytest.raises(Conflict, match=r"run:m is held by host:1 train since 20\d\d-"):
        _acquire("host:2 train")
    with transaction() as conn:
        leases.release(conn, first)
    second = _acquire("host:2 train")
    assert (first.token, second.token) == (1, 2)
    with transaction() as conn:
        leases.release(conn, first)  # a late release of what is another's now
    _check(second)


def test_a_holder_that_wakes_up_late_is_fenced_off(database: Settings) -> None:
    stale = _acquire("host:1")
    _expire()
    fresh = _acquire("host:2")
    assert fresh.token == stale.token + 1
    for use in (leases.check, leases.renew):
        with pytest.raises(Conflict, match="no longer held by host:1"), transaction() as conn:
            use(conn, stale)
    _check(fresh)


def test_a_lease_that_ran_out_is_its_holders_until_another_takes_it(database: Settings) -> None:
    lease = _acquire("host:1")
    _expire()  # as in an outage of the database that was longer than the lease
    _check(lease)
    with transaction() as conn:
        lease = leases.renew(conn, lease)
    with pytest.raises(Conflict, match="is held by host:1"):
        _acquire("host:2")


def test_nobody_takes_over_between_a_check_and_its_commit(database: Settings) -> None:
    lease = _acquire("host:1", seconds=2)
    taken: list[Lease] = []
    with db.connect() as writer:
        leases.check(writer, lease)
        time.sleep(2.2)  # the lease runs out inside the transaction that it protects
        thread = threading.Thread(target=lambda: taken.append(_acquire("host:2")))
        thread.start()
        thread.join(0.5)
        assert not taken
        writer.commit()
    thread.join(60)
    assert taken[0].token == lease.token + 1


def test_of_many_that_find_it_expired_one_gets_it(database: Settings) -> None:
    _acquire("host:0")
    _expire()
    got: list[Lease | Conflict] = []

    def take(number: int) -> None:
        try:
            got.append(_acquire(f"host:{number}"))
        except Conflict as conflict:
            got.append(conflict)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [type(one_of) for one_of in got].count(Lease) == 1
    assert len(got) == 8


def test_a_keeper_holds_on_and_lets_go(database: Settings) -> None:
    with Keeper("run:m", "host:1", seconds=4) as keeper:
        time.sleep(5)
        _check(keeper.lease)
        with pytest.raises(Conflict, match="is held by host:1"):
            _acquire("host:2")
    assert _acquire("host:2").token == keeper.lease.token + 1


def test_a_keeper_that_lost_its_lease_says_so_and_gives_nothing_back(database: Settings) -> None:
    with Keeper("run:m", "host:1", seconds=1.2) as keeper:
        with transaction() as conn:  # together: the keeper must not be quicker
            conn.execute("update lease set expires_at = clock_timestamp()")
            other = leases.acquire(conn, "run:m", "host:2")
        assert keeper.lost.wait(60)
        with pytest.raises(Conflict, match="no longer held by host:1"):
            keeper.raise_if_lost()
    _check(other)


HOLDER = """
import time
from registry.leases import Keeper
with Keeper("run:m", "dead", seconds=5):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_is_succeeded_whatever_its_clock_says(database: Settings) -> None:
    """A stopped process keeps nothing: its lease runs out on the database's clock, and its renewal then fails."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, env=dict(os.environ))
    try:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(Conflict):
            _acquire("host:2")
        until = time.monotonic() + 60
        while True:
            try:
                mine = _acquire("host:2")
                break
            except Conflict:
                assert time.monotonic() < until
                time.sleep(0.2)
        child.send_signal(signal.SIGCONT)
        time.sleep(2.5)  # longer than it waits between two renewals
        _check(mine)
        with transaction() as conn:
            assert one(conn, "select holder from lease")["holder"] == "host:2"
    finally:
        child.kill()
        child.communicate()
