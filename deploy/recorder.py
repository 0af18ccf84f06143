"""Request events: from memory to a spool file to PostgreSQL, never blocking an answer and never lost.

`Recorder.put` copies an event into a memory-mapped, append-only spool file: no system call, so it cannot block,
and the bytes belong to the kernel at once, so a killed process loses nothing. They are forced to the disk once
a second: a power cut loses at most the last second. One thread tends the spool, another reads it and sends it on
with binary COPY; an event's id makes sending twice harmless, so each event arrives exactly once. While the database
is away the spool grows, up to `MAX_SEGMENTS` files; beyond that a bounded buffer in memory, and then events are
dropped and counted.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from math import nan
from pathlib import Path
from typing import Any, LiteralString

import orjson
import psycopg
from psycopg import pq, sql
from psycopg.adapt import Dumper
from psycopg.postgres import types
from psycopg.types.json import Jsonb
from uuid_utils.compat import uuid7

from infra.db import Connection, connect, load_queries, one
from infra.errors import TunesmithError
from infra.settings import get_settings

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

SEGMENT_BYTES = 4 * 2**20
MAX_SEGMENTS = 128
MAX_MEMORY_BYTES = 32 * 2**20
BATCH_ROWS = 2000
POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0
_MAGIC = b"tsspool1"
_START = 16  # magic, then how far the segment has been sent on (u64)
_RECORD = struct.Struct("<II")  # length and CRC-32 of the JSON that follows
_SENT = struct.Struct("<Q")
# fmt: off
_TYPES = [
    "uuid", "timestamptz", "uuid", "text", "int4", "text", "text", "text", "int2", "text", "bool", "int4", "int4",
    "float4", "float4", "float4", "float8", "text", "float4[]", "text", "jsonb", "text",
]
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One request, answered or refused: the columns of ``request_event``; `at` follows from the id.

    id: UUIDv7, ours. version None: refused before routing. features: in the order of registry.profile.FEATURES,
    NaN for what is not known. messages and answer only where the model keeps text, redacted before they come here.
    """

    id: uuid.UUID
    model: str
    version: int | None = None
    slot: str = "none"
    key_id: str | None = None
    client_request_id: str | None = None
    status: int
    error: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_ms: float | None = None
    latency_ms: float
    engine_seconds: float = 0.0
    cost_usd: float = 0.0
    finish_reason: str | None = None
    features: Sequence[float] = ()
    subject: str | None = None
    messages: Any = None
    answer: str | None = None


def event_time(event_id: uuid.UUID) -> datetime:
    """The time inside a UUIDv7, to the millisecond. Raises ValueError for another kind of UUID."""
    if event_id.version != 7:
        raise ValueError(f"not a UUIDv7: {event_id}")
    return datetime.fromtimestamp((event_id.int >> 80) / 1000, UTC)


class Segment:
    """One spool file: fixed size, mapped, locked by the process that owns it.

    A record is complete when its checksum holds, so a kill in the middle of a write leaves no half event.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0)
        self.sent: int = _SENT.unpack_from(self._map, 8)[0]
        self.end = self.sent  # records up to here are complete

    @classmethod
    def create(cls, folder: Path, name: str) -> Segment:
        """A new, empty segment. Raises OSError, for instance when the disk is full."""
        path, hidden = folder / f"{name}.spool", folder / f".{name}.new"
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Written, not just extended: a hole in a full disk would end the process at the first touch.
            os.write(descriptor, _MAGIC + _SENT.pack(_START) + bytes(SEGMENT_BYTES - _START))
            if os.fstat(descriptor).st_size != SEGMENT_BYTES:
                raise OSError("the disk is full")
            hidden.rename(path)
            return cls(path, descriptor)
        except OSError:
            os.close(descriptor)
            hidden.unlink(missing_ok=True)
            raise

    @classmethod
    def adopt(cls, path: Path) -> Segment | None:
        """A segment that its process left behind; None when that process lives, or the file is not a segment."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.pread(descriptor, 8, 0) != _MAGIC or not path.exists():
                raise BlockingIOError
        except BlockingIOError:
            os.close(descriptor)
            return None
        segment = cls(path, descriptor)
        for _, end in segment.records(until=len(segment._map)):
            segment.end = end
        return segment

    def append(self, body: bytes) -> bool:
        """Add one record; False when it does not fit any more."""
        start, end = self.end + _RECORD.size, self.end + _RECORD.size + len(body)
        if end > len(self._map):
            return False
        self._map[start:end] = body
        _RECORD.pack_into(self._map, self.end, len(body), zlib.crc32(body))
        self.end = end
        return True

    def records(self, *, until: int | None = None) -> Iterator[tuple[bytes, int]]:
        """The records not sent yet, each with the offset at its end."""
        at, until = self.sent, self.end if until is None else until
        while at + _RECORD.size <= until:
            length, checksum = _RECORD.unpack_from(self._map, at)
            at += _RECORD.size
            body = self._map[at : at + length]
            at += length
            if not length or at > len(self._map) or zlib.crc32(body) != checksum:
                return
            yield body, at

    def mark_sent(self, offset: int) -> None:
        _SENT.pack_into(self._map, 8, offset)
        self.sent = offset

    def sync(self) -> None:
        """Force what was written to the disk; what was sent and closed meanwhile needs none. Raises OSError."""
        # Not `mmap.flush`, which keeps all other threads waiting for the disk
        try:
            os.fsync(self._descriptor)
        except OSError:
            if not self._map.closed:
                raise

    def close(self, *, remove: bool) -> None:
        self._map.close()
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class Recorder:
    """Takes events from any thread and sees that they arrive. `start` it, `close` it."""

    def __init__(self, folder: Path, replica: uuid.UUID) -> None:
        self.folder = folder
        self.replica = replica
        self.taken = self.arrived = self.dropped = self.rejected = 0
        self._lock = threading.Lock()  # held for microseconds only, never around a system call
        self._segments: deque[Segment] = deque()  # oldest first; the last is written to
        self._spare: Segment | None = None
        self._memory: deque[bytes] = deque()
        self._memory_bytes = 0
        self._made = 0
        self._adopted = 0
        self._full = False  # the disk, when a segment was last asked for
        self._stop = threading.Event()
        self._short = threading.Event()  # a new segment is needed soon
        self._conn: Connection | None = None
        self._tender = threading.Thread(target=self._run_tender, name="spool", daemon=True)
        self._sender = threading.Thread(target=self._run_sender, name="recorder", daemon=True)

    def start(self) -> None:
        """Open the spool, take over what dead processes left in it, begin to send. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._adopt()
        self._segments.append(self._create())
        self._tender.start()
        self._sender.start()

    def put(self, event: Event) -> None:
        """Record one event. Never blocks and never raises for the state of disk or database."""
        try:
            body = orjson.dumps(event)
        except orjson.JSONEncodeError:
            log.exception("an event is not JSON and was dropped")
            body = b""
        with self._lock:
            self.taken += 1
            if not body:
                self.dropped += 1
                return
            if not self._memory and self._append(body):
                return
            if self._memory_bytes + len(body) > MAX_MEMORY_BYTES or len(body) > SEGMENT_BYTES - 64:
                self.dropped += 1
                return
            self._memory.append(body)
            self._memory_bytes += len(body)

    @property
    def pending(self) -> int:
        """Events taken or found that have not arrived in the database yet."""
        return self.taken + self._adopted - self.arrived - self.dropped - self.rejected

    def close(self, timeout: float = 5.0) -> None:
        """Send what can be sent within `timeout` seconds; the rest stays in the spool for the next start."""
        self._stop.set()
        self._short.set()
        self._tender.join(timeout)
        self._sender.join(timeout)
        if self._tender.is_alive() or self._sender.is_alive():
            return  # the database hangs; the daemon threads end with the process, and so do the locks
        for segment in [*self._segments, *([self._spare] if self._spare else [])]:
            segment.sync()
            segment.close(remove=segment.sent == segment.end)

    # ------------------------------------------------------------ spool

    def _append(self, body: bytes) -> bool:
        """Under the lock: into the open segment, or the spare one."""
        if self._segments[-1].append(body):
            return True
        if self._spare is None:
            return False
        self._segments.append(self._spare)
        self._spare = None
        self._short.set()
        return self._segments[-1].append(body)

    def _create(self) -> Segment:
        self._made += 1
        return Segment.create(self.folder, f"{self.replica}-{self._made:06d}")

    def _adopt(self) -> None:
        for path in sorted(self.folder.glob("*.spool")):
            if not path.name.startswith(str(self.replica)) and (segment := Segment.adopt(path)):
                left = sum(1 for _ in segment.records())
                if left:
                    log.info("taking over %d events that %s held", left, path.name)
                with self._lock:
                    self._segments.appendleft(segment)
                    self._adopted += left

    def _run_tender(self) -> None:
        next_sync = 0.0
        while not self._stop.is_set():
            self._short.clear()
            try:
                self._tend()
                if time.monotonic() >= next_sync:
                    next_sync = time.monotonic() + 1.0
                    with self._lock:
                        newest = list(self._segments)[-3:]
                    for segment in newest:
                        segment.sync()
            except Exception:  # whatever it was, the spool must go on growing
                log.exception("the spool %s was not tended", self.folder)
                self._stop.wait(1.0)
            self._short.wait(POLL_SECONDS)
        self._tend()

    def _tend(self) -> None:
        """Keep a spare segment at hand, and bring what waits in memory into the spool."""
        while True:
            if self._spare is None and len(self._segments) < MAX_SEGMENTS:
                try:
                    made = self._create()
                except OSError as error:
                    if not self._full:
                        log.error("the spool %s cannot grow: %s", self.folder, error)
                    self._full = True
                    return
                self._full = False
                with self._lock:
                    self._spare = made
            with self._lock:
                while self._memory and self._append(self._memory[0]):
                    self._memory_bytes -= len(self._memory.popleft())
                if not self._memory or len(self._segments) >= MAX_SEGMENTS:
                    return

    # ------------------------------------------------------------ sending

    def _run_sender(self) -> None:
        next_hour = 0.0
        wait = 0.0
        while not self._stop.wait(wait):
            try:
                if time.monotonic() >= next_hour:
                    self._keep_house()
                    next_hour = time.monotonic() + 3600
                sent = self._send()
                # Not at once for what came meanwhile: a transaction an event would cost more than the answers. The end
                # of a segment is no end of what waits
                all_sent = sent is None or (0 < sent < BATCH_ROWS and len(self._segments) == 1)
                wait = POLL_SECONDS if all_sent else 0.0
            except (psycopg.OperationalError, psycopg.InterfaceError, TunesmithError) as error:
                if wait != RETRY_SECONDS:
                    log.warning("request events wait in %s: %s", self.folder, str(error).strip().split("\n")[0])
                self._hang_up()
                wait = RETRY_SECONDS
            except Exception:
                log.exception("request events wait in %s", self.folder)
                self._hang_up()
                wait = 5 * RETRY_SECONDS
        self._tender.join()
        try:
            while self._send() is not None:
                pass
        except (psycopg.Error, TunesmithError, OSError) as error:
            log.warning("events stay in %s for the next start: %s", self.folder, str(error).strip().split("\n")[0])
        self._hang_up()

    def _keep_house(self) -> None:
        """Partitions for the days to come, what dead processes left, and what was set aside long ago. Raises for a
        database that is away; whatever else is wrong here keeps no event from being sent."""
        try:
            with self._transaction() as conn:
                ensure_partitions(conn)
            self._adopt()
            self._drop_rejected()
        except (psycopg.OperationalError, psycopg.InterfaceError, TunesmithError):
            raise
        except Exception:
            log.exception("keeping house in %s failed", self.folder)

    def _send(self) -> int | None:
        """Send one batch of the oldest segment; how many events that were, or None when nothing is left."""
        segment = self._segments[0]
        bodies: list[bytes] = []
        offset, end_seen = segment.sent, segment.end
        for body, end in segment.records():
            bodies.append(body)
            offset = end
            if len(bodies) == BATCH_ROWS:
                break
        if bodies:
            self._deliver(bodies)
            segment.mark_sent(offset)
            return len(bodies)
        with self._lock:
            if len(self._segments) == 1:
                return None
            if segment.end != end_seen:  # filled up since it was looked at
                return 0
            self._segments.popleft()
        segment.close(remove=True)
        return 0

    def _deliver(self, bodies: Sequence[bytes]) -> None:
        """Into the database, together; what the database will not take is set aside, alone."""
        try:
            with self._transaction() as conn:
                store(conn, self.replica, [orjson.loads(body) for body in bodies])
            self.arrived += len(bodies)
        except (psycopg.DataError, psycopg.IntegrityError, ValueError, LookupError, TypeError) as error:
            # The last two: a record that another release left in the spool
            if len(bodies) > 1:
                middle = len(bodies) // 2
                self._deliver(bodies[:middle])
                self._deliver(bodies[middle:])
                return
            file = self.folder / f"rejected-{datetime.now(UTC):%Y%m%d}.jsonl"
            reason = str(error).strip().split("\n")[0]
            log.error("an event was set aside in %s: %s: %s", file, type(error).__name__, reason)
            with file.open("ab") as rejected:
                rejected.write(bodies[0] + b"\n")
            self.rejected += 1

    def _drop_rejected(self) -> None:
        """What was set aside may hold people's text, and goes as the events themselves do."""
        oldest = datetime.now(UTC).date() - timedelta(days=get_settings().event_retention_days)
        for file in self.folder.glob("rejected-????????.jsonl"):
            if file.name < f"rejected-{oldest:%Y%m%d}":
                file.unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """One transaction on the thread's own connection, opened when needed."""
        if self._conn is None or self._conn.closed:
            self._conn = connect(autocommit=True)
        with self._conn.transaction():
            yield self._conn

    def _hang_up(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None


def store(conn: Connection, replica: uuid.UUID, events: Sequence[Mapping[str, Any]]) -> int:
    """Insert events (as `Event`'s fields, from JSON) and their ``event_batch``; returns how many were new.

    An event that is there already is left alone, so replays are harmless. Raises psycopg.DataError, ValueError,
    LookupError or TypeError when one of the events does not fit the table.
    """
    if not events:
        return 0
    batch = uuid7()
    rows = [_row(event, batch) for event in events]
    times = [row[1] for row in rows]
    told = {"id": batch, "replica": replica, "first_at": min(times), "last_at": max(times)}
    conn.execute(SQL["wait_for_erasures"])
    new = 0 if one(conn, SQL["may_be_erased"], told)["yes"] else _store_new(conn, rows)
    if not new:
        conn.execute(SQL["make_stage"])
        _copy(conn, SQL["copy_to_stage"], rows)
        new = conn.execute(SQL["insert_events"]).rowcount
    if new:
        conn.execute(SQL["insert_batch"], told | {"rows": new})
    return new


def _store_new(conn: Connection, rows: Sequence[tuple[Any, ...]]) -> int:
    """Copy rows straight into the table, which is quicker than over another one; none where any is there already."""
    try:
        with conn.transaction():
            _copy(conn, SQL["copy"], rows)
        return len(rows)
    except psycopg.errors.UniqueViolation:
        return 0


def _copy(conn: Connection, query: LiteralString, rows: Sequence[tuple[Any, ...]]) -> None:
    with conn.cursor() as cursor:
        cursor.adapters.register_dumper(None, _Floats)
        with cursor.copy(query) as copy:
            copy.set_types(_TYPES)
            for row in rows:
                copy.write_row(row)


_FLOAT, _FLOATS = types["float4"].oid, types["float4"].array_oid
_NO_FLOATS = struct.pack("!iii", 0, 0, _FLOAT)


class _Floats(Dumper):
    """An array of 32-bit floats as PostgreSQL's binary form has it, at once: psycopg's own dumps them one by one, which
    was half of what an event took."""

    format = pq.Format.BINARY
    oid = _FLOATS

    def dump(self, obj: Sequence[float]) -> bytes:
        size = len(obj)
        if not size:
            return _NO_FLOATS
        values: list[float] = [4] * (2 * size)  # each value after its length in bytes
        values[1::2] = obj
        return _floats(size).pack(1, 0, _FLOAT, size, 1, *values)


@lru_cache(maxsize=8)
def _floats(size: int) -> struct.Struct:
    return struct.Struct("!iiiii" + size * "if")


def _row(event: Mapping[str, Any], batch: uuid.UUID) -> tuple[Any, ...]:
    identifier = uuid.UUID(event["id"])
    return (
        identifier,
        event_time(identifier),
        batch,
        event["model"],
        event["version"],
        event["slot"],
        event["key_id"],
        event["client_request_id"],
        event["status"],
        event["error"],
        event["stream"],
        event["prompt_tokens"],
        event["completion_tokens"],
        event["ttft_ms"],
        event["latency_ms"],
        event["engine_seconds"],
        event["cost_usd"],
        event["finish_reason"],
        [nan if value is None else value for value in event["features"]],
        event["subject"],
        None if event["messages"] is None else Jsonb(event["messages"]),
        event["answer"],
    )


def ensure_partitions(conn: Connection, *, days_ahead: int = 3) -> list[str]:
    """Make the day partitions of ``request_event`` for today (UTC) and `days_ahead` days; returns the new ones.

    Events whose day has no partition go to the default one, so being late loses nothing.
    """
    conn.execute(SQL["lock_partitions"])
    today: date = one(conn, SQL["today"])["today"]
    there = {row["name"] for row in conn.execute(SQL["partitions"])}
    made = []
    for day in (today + timedelta(days=ahead) for ahead in range(days_ahead + 1)):
        name = f"request_event_{day:%Y%m%d}"
        if name in there:
            continue
        try:
            with conn.transaction():
                conn.execute(SQL["soon"])
                conn.execute(
                    sql.SQL("create table {} partition of request_event for values from ({}) to ({})").format(
                        sql.Identifier(name),
                        sql.Literal(f"{day} 00:00:00+00"),
                        sql.Literal(f"{day + timedelta(days=1)} 00:00:00+00"),
                    )
                )
            made.append(name)
        except psycopg.errors.LockNotAvailable:  # behind one who waits for a long reader everybody would wait
            log.info("request_event is being read for long: the partition of %s is made later", day)
            break
        except psycopg.errors.CheckViolation:
            log.warning("events of %s are in the default partition already and stay there", day)
    return made
