"""Request events survive what processes do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from uuid_utils.compat import uuid7

from deploy.recorder import Event, Recorder, Segment, ensure_partitions, event_time, store
from infra.db import transaction
from infra.settings import Settings


def event(**values: object) -> Event:
    return Event(**{"id": uuid7(), "model": "m", "version": 1, "status": 200, "latency_ms": 12.5} | values)  # type: ignore[arg-type]


def count() -> tuple[int, int]:
    """Rows in the table, and rows that the batches tell of."""
    with transaction() as conn:
        row = conn.execute(
            "select (select count(*) from request_event) events, (select coalesce(sum(rows), 0) from event_batch) told"
        ).fetchone()
    assert row is not None
    return row["events"], row["told"]


def all_arrived(recorder: Recorder) -> None:
    deadline = time.monotonic() + 30
    while recorder.pending > 0:
        assert time.monotonic() < deadline, f"{recorder.pending} events never arrived"
        time.sleep(0.02)


def test_every_field_arrives(database: Settings) -> None:
    recorder = Recorder(database.home / "spool", uuid.uuid4())
    recorder.start()
    sent = event(
        slot="champion",
        key_id="k",
        client_request_id="theirs",
        stream=True,
        prompt_tokens=7,
        completion_tokens=3,
        ttft_ms=1.5,
        engine_seconds=0.25,
        cost_usd=1e-9,
        finish_reason="stop",
        features=[1.0, float("nan"), 2.5],
        subject="sha256:x",
        messages=[{"role": "user", "content": "hé"}],
        answer="<script>",
    )
    refused = event(version=None, status=429, error="too many", model="")
    recorder.put(sent)
    recorder.put(refused)
    all_arrived(recorder)
    recorder.close()
    with transaction() as conn:
        rows = {row["id"]: row for row in conn.execute("select * from request_event")}
        homes = {r["home"] for r in conn.execute("select tableoid::regclass::text home from request_event")}
    row = rows[sent.id]
    assert row["at"] == event_time(sent.id)
    assert row["messages"] == [{"role": "user", "content": "hé"}]
    assert str(row["features"]) == "[1.0, nan, 2.5]"
    assert (row["cost_usd"], row["ttft_ms"], row["stream"], row["answer"]) == (1e-9, 1.5, True, "<script>")
    assert rows[refused.id]["version"] is None
    assert all(name.startswith("request_event_2") for name in homes), "the day's partition, not the default"
    assert not list((database.home / "spool").glob("*.spool"))


def test_the_same_event_twice_counts_once(database: Settings) -> None:
    rows = [orjson.loads(orjson.dumps(event())) for _ in range(10)]
    with transaction() as conn:
        assert len(ensure_partitions(conn)) == 4
        assert ensure_partitions(conn) == []
        assert store(conn, uuid.uuid4(), rows[:7]) == 7
        assert store(conn, uuid.uuid4(), rows[::-1]) == 3
        assert store(conn, uuid.uuid4(), rows) == 0
    assert count() == (10, 10)


def test_a_killed_process_loses_nothing(database: Settings) -> None:
    # The child records without a database, says how many events it has taken, and is killed without warning.
    program = """
import sys, time, uuid
from pathlib import Path
from deploy import recorder
recorder.SEGMENT_BYTES = 262144  # so that many files are in play
from tests.integration.test_recorder import event
r = recorder.Recorder(Path(sys.argv[1]), uuid.uuid4()); r.start()
for i in range(1, 100_000):
    r.put(event())
    if i % 50 == 0:
        print(i, flush=True)
        time.sleep(0.002)
"""
    environment = dict(os.environ, TUNESMITH_DATABASE_URL="postgresql://nobody:x@127.0.0.1:1/none", PYTHONPATH=".")
    spool = database.home / "spool"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(spool)], stdout=subprocess.PIPE, env=environment, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    said = 0
    while said < 2000:
        said = int(child.stdout.readline())
    child.kill()
    said = max([said, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
    child.stdout.close()
    child.wait()
    recorder = Recorder(spool, uuid.uuid4())
    recorder.start()
    all_arrived(recorder)
    recorder.close()
    events, told = count()
    assert events == told
    assert said <= events <= said + 50
    again = Recorder(spool, uuid.uuid4())
    again.start()
    all_arrived(again)
    again.close()
    assert count() == (events, told)


def test_a_poisoned_event_does_not_hold_up_the_others(database: Settings) -> None:
    recorder = Recorder(database.home / "spool", uuid.uuid4())
    recorder.start()
    for number in range(20):
        recorder.put(event(answer="\0") if number in (7, 9) else event())
    all_arrived(recorder)
    recorder.close()
    assert count() == (18, 18)
    assert recorder.rejected == 2
    assert len(rejected(database.home / "spool")) == 2


def rejected(spool: Path) -> list[str]:
    [file] = spool.glob("rejected-*.jsonl")
    return file.read_text().splitlines()


def test_what_another_release_left_in_the_spool_does_not_hold_up_the_others(database: Settings) -> None:
    spool = database.home / "spool"
    spool.mkdir(mode=0o700)
    left = Segment.create(spool, f"{uuid.uuid4()}-000001")
    bodies = [orjson.dumps(event()) for _ in range(4)]
    later: dict[str, object] = orjson.loads(bodies[1])
    del later["latency_ms"]
    bodies[1] = orjson.dumps(later)
    bodies[2] = orjson.dumps(orjson.loads(bodies[2]) | {"features": 7})
    for body in [*bodies, b"[1]"]:
        assert left.append(body)
    left.close(remove=False)
    old = spool / f"rejected-{datetime.now(UTC) - timedelta(days=database.event_retention_days + 1):%Y%m%d}.jsonl"
    old.write_text("{}\n")
    recorder = Recorder(spool, uuid.uuid4())
    recorder.start()
    recorder.put(event())
    all_arrived(recorder)
    recorder.close()
    assert count() == (3, 3)
    assert recorder.rejected == 3
    assert rejected(spool) == [bodies[1].decode(), bodies[2].decode(), "[1]"]
    assert not old.exists(), "kept no longer than the events"


def test_a_disk_that_fails_once_ends_nothing(
    database: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([OSError(5, "Input/output error")])

    def sync(segment: Segment) -> None:
        for error in failures:
            raise error

    monkeypatch.setattr("deploy.recorder.SEGMENT_BYTES", 8192)
    monkeypatch.setattr(Segment, "sync", sync)
    recorder = Recorder(database.home / "spool", uuid.uuid4())
    recorder.start()
    while "was not tended" not in caplog.text:
        time.sleep(0.05)
    for _ in range(200):  # more than a segment holds: spares are made
        recorder.put(event())
    all_arrived(recorder)
    recorder.close()
    assert (recorder.dropped, count()) == (0, (200, 200))


def test_a_full_disk_is_waited_for_in_memory(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True
    create = Segment.create

    def limited(folder: Path, name: str) -> Segment:
        if full and not name.endswith("-000001"):
            raise OSError(28, "No space left on device")
        return create(folder, name)

    monkeypatch.setattr("deploy.recorder.SEGMENT_BYTES", 8192)
    monkeypatch.setattr("deploy.recorder.Recorder._send", lambda self: False)
    monkeypatch.setattr(Segment, "create", limited)
    recorder = Recorder(database.home / "spool", uuid.uuid4())
    recorder.start()
    for _ in range(100):
        recorder.put(event())
    time.sleep(0.3)
    monkeypatch.undo()
    full = False
    all_arrived(recorder)
    recorder.close()
    assert recorder.dropped == 0
    assert count() == (100, 100)
