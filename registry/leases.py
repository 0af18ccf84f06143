"""Row leases with fencing tokens: one run a model, one watcher. Expiry follows the database's clock alone.

A holder may be stopped at any point and wake up after its lease has gone to another. So every write that the
lease protects calls `check` first, in the same transaction: it holds the row against a takeover until the commit,
and refuses a token that is not the newest. A lease that ran out may be taken; until it is, its holder keeps it, so
that a database that was away for longer than a lease ends nobody's work.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from infra.db import Connection, load_queries, transaction
from infra.errors import Conflict, TunesmithError

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """`token` grows by one with every acquisition of the name and is never given twice."""

    name: str
    holder: str
    token: int
    expires_at: datetime
    seconds: float


def this_process(purpose: str) -> str:
    """A holder's name: host, process and what for."""
    return f"{socket.gethostname()}:{os.getpid()} {purpose}"


def acquire(conn: Connection, name: str, holder: str, seconds: float = 60) -> Lease:
    """Take a lease that is free or expired, for `seconds` on the database's clock.

    Raises Conflict, naming the holder and since when, while another one holds it (the same holder too: a lease is
    not re-entrant).
    """
    row = conn.execute(SQL["acquire"], {"name": name, "holder": holder, "seconds": seconds}).fetchone()
    if row is None:
        held = conn.execute(SQL["held"], {"name": name}).fetchone()
        if held is None:  # rows are never deleted; only a hand in the database does that
            raise Conflict(f"The lease {name} changed hands.", hint="Try again.")
        raise Conflict(
            f"{name} is held by {held['holder']} since {held['acquired_at']:%Y-%m-%d %H:%M:%S %Z}.",
            hint=f"Wait for it to end; if it died, its lease ends at {held['expires_at']:%H:%M:%S %Z}.",
            details={"holder": held["holder"], "since": held["acquired_at"]},
        )
    return Lease(**row, seconds=seconds)


def renew(conn: Connection, lease: Lease) -> Lease:
    """Hold on for another `lease.seconds`. Raises Conflict when it went to another."""
    row = conn.execute(SQL["renew"], {"name": lease.name, "token": lease.token, "seconds": lease.seconds}).fetchone()
    if row is None:
        raise _lost(lease)
    return Lease(**row, seconds=lease.seconds)


def check(conn: Connection, lease: Lease) -> None:
    """Let this transaction write under the lease; nobody can take it over before it ends.

    Raises Conflict when the lease went to another.
    """
    row = conn.execute(SQL["check"], {"name": lease.name}).fetchone()
    if row is None or row["token"] != lease.token:
        raise _lost(lease)


def release(conn: Connection, lease: Lease) -> None:
    """Give the lease back at once; harmless when it is lost already. The token stays, so it never repeats."""
    conn.execute(SQL["release"], {"name": lease.name, "token": lease.token})


class Keeper:
    """Holds a lease for the length of a block: a thread renews it three times in its duration.

    ``with Keeper("run:m", this_process("run")) as keeper:`` acquires (Conflict when held) and releases at the end.
    `keeper.lease` is the lease to `check` in each writing transaction. When renewal fails for so long that another
    takes the lease, `lost` is set, and `raise_if_lost` raises: long work calls it now and then.
    """

    def __init__(self, name: str, holder: str, *, seconds: float = 60) -> None:
        self.name, self.holder, self.seconds = name, holder, seconds
        self.lost = threading.Event()
        self._stop = threading.Event()
        self._lease: Lease | None = None
        self._thread = threading.Thread(target=self._keep, name=f"lease {name}", daemon=True)

    @property
    def lease(self) -> Lease:
        if self._lease is None:
            raise RuntimeError("the lease is known inside the with block only")
        return self._lease

    def raise_if_lost(self) -> None:
        if self.lost.is_set():
            raise _lost(self.lease)

    def __enter__(self) -> Keeper:
        with transaction() as conn:
            self._lease = acquire(conn, self.name, self.holder, self.seconds)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost.is_set():
            return
        try:
            with transaction() as conn:
                release(conn, self.lease)
        except TunesmithError as problem:  # it expires by itself; the block's own outcome matters more
            log.warning("lease %s was not released: %s", self.name, problem)

    def _keep(self) -> None:
        wait = self.seconds / 3
        while not self._stop.wait(wait):
            try:
                with transaction() as conn:
                    self._lease = renew(conn, self.lease)
                wait = self.seconds / 3
            except Conflict:
                log.warning("lease %s was lost by %s", self.name, self.holder)
                self.lost.set()
                return
            except Exception as problem:  # the database may be restarting
                log.warning("lease %s was not renewed: %s", self.name, problem)
                wait = self.seconds / 30  # it may have run out: be there before one who would take it


def _lost(lease: Lease) -> Conflict:
    return Conflict(
        f"{lease.name} is no longer held by {lease.holder} (token {lease.token}).",
        hint="Another process took it over after it expired; this one must stop.",
    )
