"""Request events against MLflow's traces over OTLP, into one PostgreSQL, until they are durable.

    .venv/bin/python tests/benchmarks/telemetry.py [--short] [--rounds N] [--batch 1|100|500]

Ours: `deploy.recorder` in a process of its own, as in a gateway: memory, spool file, binary COPY, with as many events
a transaction as the peer has spans a request; and `POST /v1/events`, by which other gateways send theirs. MLflow: its
server on uvloop, one worker, one connection that stays open, requests made before the clock runs, a trace a span with
what our events hold. MLflow stores general traces, trees of spans of any kind, and its server checks and indexes them;
our events are flat rows. The sides take turns; after each round all must be in the database. Then writer and database
are killed in the middle, on both sides, and what was acknowledged is looked for. No time is asserted. Run it alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil
import psycopg
from _home import cpu_seconds, gateway, mlflow, temporary_home
from promotions import add_versions
from uuid_utils.compat import uuid7

from deploy import recorder
from deploy.auth import create_key
from deploy.recorder import Event, Recorder
from infra import postgres, processes
from infra.db import transaction
from infra.settings import get_settings
from registry.profile import FEATURES

SIDES = ("recorder", "/v1/events", "MLflow")
TARGET = {500: 100}  # times MLflow's rate that the recorder is to have
TEXT = "write the one-line docstring of a function that adds two numbers"


@dataclass(frozen=True, kw_only=True)
class Size:
    """`counts` are the events of a round, by batch size: of the recorder, of those that are sent over HTTP."""

    rounds: int
    counts: Mapping[int, tuple[int, int]]
    killed: int


LONG = Size(rounds=5, counts={1: (3000, 600), 100: (60_000, 3000), 500: (200_000, 5000)}, killed=100_000)
_AHEAD = 50_000  # events that are not in the database yet
SHORT = Size(rounds=1, counts={1: (300, 50), 100: (5000, 300), 500: (20_000, 1000)}, killed=20_000)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where all is; `servers` are the processes whose time is a side's, beside the database's."""

    home: Path
    database_port: int
    key: str
    urls: Mapping[str, str]
    servers: Mapping[str, psutil.Process]

    def spent(self, side: str) -> float:
        """CPU seconds so far of a side's server and of the database."""
        return sum(cpu_seconds(each) for each in (*filter(None, [self.servers.get(side)]), _postmaster(self.home)))


def main() -> None:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--short", action="store_true", help="few events, to see that all of it works")
    reader.add_argument(
        "--batch", type=int, action="append", choices=tuple(LONG.counts), help="only this one; may be repeated"
    )
    reader.add_argument("--rounds", type=int, help="how often the sides take turns")
    reader.add_argument("--write", help=argparse.SUPPRESS)  # the process that writes a round's events
    given = reader.parse_args()
    if given.write:
        write(**json.loads(given.write))
        return
    size = SHORT if given.short else LONG
    with _bench() as bench:
        for batch in given.batch or size.counts:
            compare(bench, size, batch, given.rounds or size.rounds)
    kill(size)


# --- how fast ---


def compare(bench: Bench, size: Size, batch: int, rounds: int) -> None:
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            count = size.counts[batch][0 if side == "recorder" else 1]
            before, spent = stored(side), bench.spent(side)
            seconds, own = one_round(bench, side, batch, count)
            if (there := stored(side) - before) != count:
                sys.exit(f"{side}: {there} of {count} are in the database.")
            if number:  # the first round only warms all up
                rates[side].append(count / seconds)
                cpu[side].append(1000 * (bench.spent(side) - spent + own) / count)
    say(f"\n{batch} a batch, one writer, {rounds} rounds a side, until durable and counted")
    for side in SIDES:
        say(f"  {side:<11} {statistics.median(rates[side]):10,.0f} a second ({min(rates[side]):,.0f} to "
            f"{max(rates[side]):,.0f}), {statistics.median(cpu[side]):.3f} ms of CPU each")  # fmt: skip
    for side in SIDES[:2]:
        ratios = [mine / theirs for mine, theirs in zip(rates[side], rates["MLflow"], strict=True)]
        aim = f", target {TARGET[batch]}" if side == "recorder" and batch in TARGET else ""
        say(f"  {side} against MLflow: {statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}{aim})")


def one_round(bench: Bench, side: str, batch: int, count: int) -> tuple[float, float]:
    """Seconds from the first event to the last one's being durable; CPU seconds of a writer that is no server's."""
    if side == "recorder":
        job = {"count": count, "batch": batch, "folder": str(bench.home / "spool")}
        done = subprocess.run(
            [sys.executable, __file__, "--write", json.dumps(job)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"The recorder failed:\n{done.stderr[-3000:]}")
        told = json.loads(done.stdout)
        return told["seconds"], told["cpu"]
    bodies = [body_of(side, min(batch, count - at)) for at in range(0, count, batch)]
    where = http.client.HTTPConnection(bench.urls[side].removeprefix("http://"), timeout=300)
    where.connect()
    begun = time.perf_counter()
    for body in bodies:
        post(where, side, body, bench.key)
    return time.perf_counter() - begun, 0.0


def write(count: int, batch: int, folder: str, acknowledged: str | None = None) -> None:
    """Events through a recorder; tells how long it took until all were in the database. With `acknowledged`, a file in
    which stands how many were taken, for when this process is killed."""
    recorder.BATCH_ROWS = batch
    events = [event() for _ in range(count)]
    taken = mmap.mmap(os.open(acknowledged, os.O_RDWR), 8) if acknowledged else None
    own = Recorder(Path(folder), uuid.uuid4())
    own.start()
    time.sleep(0.5)  # connected, and its partitions made
    cpu, begun = time.process_time(), time.perf_counter()
    for number, each in enumerate(events, start=1):
        own.put(each)
        # No gateway makes events without end: what a loop can make beyond the spool and its buffer is dropped
        while not number % 1000 and own.pending > _AHEAD:
            time.sleep(0.001)
        if taken is not None:
            taken[:] = number.to_bytes(8, "little")
    while own.pending:
        time.sleep(0.001)
    told = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
    own.close()
    if own.dropped or own.rejected:
        sys.exit(f"{own.dropped} dropped, {own.rejected} set aside")
    print(json.dumps(told))


def event() -> Event:
    return Event(
        id=uuid7(), model="m", version=1, slot="champion", key_id="bench", client_request_id="a-request", status=200,
        stream=True, prompt_tokens=87, completion_tokens=21, ttft_ms=31.5, latency_ms=812.25, engine_seconds=0.41,
        cost_usd=1.1e-5, finish_reason="stop", features=[random.random() for _ in FEATURES],
    )  # fmt: skip


def body_of(side: str, count: int) -> bytes:
    """A request with so many events."""
    if side == "MLflow":
        return spans(count)
    lines = []
    for each in (asdict(event()) for _ in range(count)):
        kept = {
            name: each[name] for name in each if name not in ("key_id", "features", "subject", "messages", "answer")
        }
        lines.append(orjson.dumps(kept))
    return b"\n".join(lines)


def spans(count: int) -> bytes:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

    def text(value: str) -> AnyValue:
        return AnyValue(string_value=value)

    made = []
    for _ in range(count):
        now, each = time.time_ns(), event()
        attributes = {
            "gen_ai.operation.name": text("chat"),
            "gen_ai.request.model": text(each.model),
            "gen_ai.response.id": text(str(each.id)),
            "gen_ai.response.finish_reasons": text("stop"),
            "gen_ai.usage.input_tokens": AnyValue(int_value=each.prompt_tokens),
            "gen_ai.usage.output_tokens": AnyValue(int_value=each.completion_tokens),
            "version": AnyValue(int_value=1),
            "slot": text(each.slot),
            "status": AnyValue(int_value=each.status),
            "ttft_ms": AnyValue(double_value=31.5),
            "cost_usd": AnyValue(double_value=each.cost_usd),
            "features": text(" ".join(f"{value:.4f}" for value in each.features)),
        }
        made.append(
            Span(
                trace_id=os.urandom(16), span_id=os.urandom(8), name="chat m", kind=Span.SPAN_KIND_SERVER,
                start_time_unix_nano=now - 812_250_000, end_time_unix_nano=now,
                attributes=[KeyValue(key=key, value=value) for key, value in attributes.items()],
                status=Status(code=Status.STATUS_CODE_OK),
            )
        )  # fmt: skip
    request = ExportTraceServiceRequest(resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=made)])])
    return bytes(request.SerializeToString())


def post(where: http.client.HTTPConnection, side: str, body: bytes, key: str) -> None:
    """Send a batch, and wait for its acknowledgement. Raises OSError or HTTPException when the server goes away."""
    if side == "MLflow":
        head = {"content-type": "application/x-protobuf", "x-mlflow-experiment-id": "0"}
        where.request("POST", "/v1/traces", body, head)
    else:
        head = {"content-type": "application/x-ndjson", "authorization": f"Bearer {key}"}
        where.request("POST", "/v1/events", body, head)
    answer = where.getresponse()
    text = answer.read()
    if answer.status >= 500:
        raise OSError(f"{side} answered {answer.status}")
    if answer.status != 200:
        sys.exit(f"{side} answered {answer.status}: {text[:500]!r}")


def stored(side: str) -> int:
    """How many events, or spans, are in the database."""
    url = get_settings().database("mlflow" if side == "MLflow" else "tunesmith")
    with psycopg.connect(url) as conn:
        table = "spans" if side == "MLflow" else "request_event"
        found = conn.execute(f"select count(*) from {table}").fetchone()  # noqa: S608  one of two names
    assert found is not None
    return int(found[0])


# --- what a kill costs ---


def kill(size: Size) -> None:
    """Writer and database die in the middle, then both come back; what was acknowledged is looked for."""
    say("\nthe writer is killed (SIGKILL) and the database restarted at once (SIGQUIT), both in the middle")
    with _bench() as bench:
        kill_ours(bench, size)
    with _bench() as bench:
        kill_mlflow(bench)


def kill_ours(bench: Bench, size: Size) -> None:
    said = bench.home / "acknowledged"
    said.write_bytes(bytes(8))
    spool = str(bench.home / "spool-of-the-killed")
    job = {"count": 10 * size.killed, "batch": 500, "folder": spool, "acknowledged": str(said)}
    writer = subprocess.Popen([sys.executable, __file__, "--write", json.dumps(job)], stdout=subprocess.DEVNULL)

    def taken() -> int:
        return int.from_bytes(said.read_bytes(), "little")

    _until(lambda: taken() > size.killed / 2)
    with _restarted(bench):
        _until(lambda: stored("recorder") > 0)
        writer.kill()
        writer.wait()
        acknowledged, begun = taken(), stored("recorder")
        next_one = Recorder(Path(spool), uuid.uuid4())
        next_one.start()
        _until(lambda: not next_one.pending)
        next_one.close()
        there = stored("recorder")
    lost = max(0, acknowledged - there)
    say(f"  recorder    {acknowledged:,} taken when it died, {begun:,} of them in the database, {there:,} after the "
        f"next start: {lost} lost, {max(0, there - acknowledged - 1)} twice")  # fmt: skip
    if there not in (acknowledged, acknowledged + 1):  # one may have been taken and not counted
        sys.exit("Events were lost, or counted twice.")


def kill_mlflow(bench: Bench) -> None:
    where = http.client.HTTPConnection(bench.urls["MLflow"].removeprefix("http://"), timeout=60)
    acknowledged, batch = 0, 100

    def until(most: int) -> None:
        nonlocal acknowledged
        end = time.monotonic() + 120
        while acknowledged < most:
            try:
                post(where, "MLflow", body_of("MLflow", batch), "")
                acknowledged += batch
            except (OSError, http.client.HTTPException):  # as a client does, that sends again
                where.close()
                if time.monotonic() > end:
                    sys.exit("MLflow did not come back.")

    until(1000)
    with _restarted(bench):
        until(2000)
        processes.signal_group(bench.servers["MLflow"].pid, signal.SIGKILL)
        there = stored("MLflow")
    say(f"  MLflow      {acknowledged:,} acknowledged when it died, {there:,} in the database: "
        f"{max(0, acknowledged - there)} lost, {max(0, there - acknowledged)} of calls that failed")  # fmt: skip


@contextmanager
def _restarted(bench: Bench) -> Iterator[None]:
    """The database server goes down as after a crash, and a new one stands within the block."""
    old = _postmaster(bench.home)
    old.send_signal(signal.SIGQUIT)
    with suppress(psutil.TimeoutExpired):
        old.wait(30)
    cluster = postgres.prepare(bench.home)
    with (bench.home / "postgres" / "server.log").open("ab") as log:
        server = cluster.start(bench.database_port, output=log)
    try:
        cluster.wait(server, bench.database_port)
        yield
    finally:
        postgres.stop(server)


def _until(true: Any) -> None:
    end = time.monotonic() + 300
    while not true():
        if time.monotonic() > end:
            sys.exit("It never came to that.")
        time.sleep(0.01)


# --- the house ---


@contextmanager
def _bench() -> Iterator[Bench]:
    with temporary_home() as (home, database_port), ExitStack() as stack:
        with transaction() as conn:
            key = create_key(conn, name="bench", role="admin").key
            add_versions(conn, "m", 1)
        urls, servers = {}, {}
        for side, serve in (("/v1/events", gateway), ("MLflow", mlflow)):
            urls[side], servers[side] = stack.enter_context(serve(home))
        yield Bench(home=home, database_port=database_port, key=key, urls=urls, servers=servers)


def _postmaster(home: Path) -> psutil.Process:
    return psutil.Process(int((home / "postgres" / "data" / "postmaster.pid").read_text().splitlines()[0]))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
