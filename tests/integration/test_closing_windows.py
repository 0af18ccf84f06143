"""Every event is in its windows exactly once, and windows answer without raw rows."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import traffic

from deploy import recorder
from infra.db import one, transaction
from infra.settings import Settings
from monitoring import windows
from monitoring.windows import GRAINS, Window, total

REPLICA = uuid.uuid4()
PAIRS = [(f"shutil.copy{i}(src, dst, *, follow_symlinks=True)", f"Copy file {i} from src to dst.") for i in range(40)]
PROFILE = traffic.profile(PAIRS, PAIRS)


def send(events: list[dict[str, Any]]) -> int:
    with transaction() as conn:
        return recorder.store(conn, REPLICA, events)


def close_all() -> int:
    events = 0
    while True:
        with transaction() as conn:
            closed = windows.close(conn, rows=30)
        if not closed.events:
            return events
        events += closed.events


def at(minutes: float) -> datetime:
    """A time so long ago, in the middle of its minute."""
    return traffic.minutes_ago(minutes).replace(second=30)


def make(n: int, *, minutes: float, **changes: Any) -> list[dict[str, Any]]:
    return [traffic.event("m", 1, PROFILE, PAIRS[i % 40], at=at(minutes)) | changes for i in range(n)]


def stored() -> Window:
    with transaction() as conn:
        return windows.read(conn, "m", 1, traffic.minutes_ago(3 * 1440), datetime.now(UTC))


def test_replays_late_events_and_racing_closers_count_once(database: Settings) -> None:
    with transaction() as conn:
        recorder.ensure_partitions(conn)
        traffic.register(conn, "m", 1, PROFILE, settings={})
    first = [*make(50, minutes=5), *make(50, minutes=130), *make(3, minutes=1500), *make(7, minutes=5, status=503)]
    assert send(first) == 110
    assert send(first) == 0, "the same events again"
    assert send([*first[:20], *make(10, minutes=130)]) == 10, "old and new in one batch"
    racers = [threading.Thread(target=close_all) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert close_all() == 0
    send(first)
    assert close_all() == 0

    window = stored()
    with transaction() as conn:
        events = conn.execute(
            "select at, slot, status, prompt_tokens, completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd,"
            " features, messages from request_event"
        ).fetchall()
    assert window == total(windows.of_event(event) for event in events)
    assert (window.requests, window.errors, window.answered) == (120, 7, 113)
    assert sum(window.histogram("words")) == 113
    assert window.cost_usd == pytest.approx(120 * 0.0001)


def test_hours_and_days_are_the_merges_of_their_minutes(database: Settings) -> None:
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
    for minutes in (2, 3, 61, 62, 200, 1441, 2000):
        send(make(5, minutes=minutes))
        close_all()
    now = datetime.now(UTC)
    with transaction() as conn:
        grains = {g: windows.series(conn, "m", [1], now - timedelta(days=4), now, g) for g in GRAINS}
    for coarse, fine in (("hour", "minute"), ("day", "hour")):
        for point in grains[coarse]:  # type: ignore[index]
            inside = [p.window for p in grains[fine] if windows.floor(p.start, coarse) == point.start]  # type: ignore[index,arg-type]
            assert point.window == total(inside)
    assert total(p.window for p in grains["day"]).requests == 35
    # any span, to the minute, is exactly the minutes in it
    for since, until in ((2000, 0), (1441, 62), (200.2, 61), (3, 3), (2500, 1500)):
        begin, end = at(since), at(until)
        with transaction() as conn:
            got = windows.read(conn, "m", 1, begin, end)
        first, last = windows.floor(begin, "minute"), windows.floor(end, "minute")
        assert got == total(p.window for p in grains["minute"] if first <= p.start <= last), (since, until)


def test_a_rolled_back_close_leaves_the_batch_open(database: Settings) -> None:
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
    send(make(5, minutes=1))
    with transaction() as conn:
        assert windows.close(conn).events == 5
        conn.rollback()  # as when the process is killed before the commit
    assert stored().requests == 0
    assert close_all() == 5
    assert stored().requests == 5


def test_refused_requests_and_erased_events_hold_nothing_up(database: Settings) -> None:
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
    send(make(3, minutes=1, version=None, slot="none", status=404))
    erased = make(4, minutes=1)
    send(erased)
    with transaction() as conn:
        conn.execute("delete from request_event where id = any(%s)", ([e["id"] for e in erased],))
    send(make(2, minutes=1))
    close_all()
    assert stored().requests == 2
    with transaction() as conn:
        assert one(conn, "select count(*) as n from event_batch where windowed_at is null")["n"] == 0


def test_new_words_are_counted_where_text_is_kept(database: Settings) -> None:
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
    send([traffic.event("m", 1, PROFILE, ("axis ndarray dtype", "x"), keep_text=True) for _ in range(4)])
    send([traffic.event("m", 1, PROFILE, ("secret word", "x")) for _ in range(4)])
    close_all()
    assert stored().new_words.counts == {"axis": 4, "ndarray": 4, "dtype": 4}
    with transaction() as conn:
        windows.drop_old(conn, 30)
    assert stored().new_words.counts, "they are of today"
    with transaction() as conn:
        conn.execute("update traffic_window set start = start - interval '31 days' where grain = 'day'")
        windows.drop_old(conn, 30)
        [kept] = conn.execute("select sketches from traffic_window where grain = 'day'").fetchall()
    assert kept["sketches"]["new_words"] == {"counts": {}, "error": 0}, "a word that only one had may be a name"
    assert kept["sketches"]["numbers"][0] > 0, "all else is kept"


@pytest.mark.slow
def test_pages_read_windows_only_and_by_index_under_a_million_events(database: Settings) -> None:
    """A month of a million events and its windows: no console read touches an event, or scans the windows."""
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
        conn.execute(
            "insert into request_event (id, at, batch, model, version, slot, status, stream, prompt_tokens,"
            " completion_tokens, latency_ms, engine_seconds, cost_usd, features)"
            " select gen_random_uuid(), now() - i * interval '2 seconds', gen_random_uuid(), 'm', 1, 'champion', 200,"
            " false, 1, 1, 1, 1, 0, '{}' from generate_series(1, 1000000) i"
        )
    send(make(20, minutes=1))
    close_all()
    with transaction() as conn:
        for grain, step, n in (("minute", "1 minute", 12_000), ("hour", "1 hour", 3_000), ("day", "1 day", 700)):
            conn.execute(
                "insert into traffic_window select model, v, date_trunc(%(g)s, now(), 'UTC') - i * %(s)s::interval,"
                " %(g)s, requests, errors, sketches from traffic_window, generate_series(1, %(n)s) i,"
                " generate_series(1, 3) v where grain = 'day' on conflict do nothing",
                {"g": grain, "s": step, "n": n},
            )
        conn.execute("analyze")
    now = datetime.now(UTC)
    spans = {
        "minute_from": now - timedelta(hours=30),
        "hour_from": now - timedelta(hours=29),
        "day_from": now - timedelta(hours=24),
        "day_to": now,
        "hour_to": now,
        "minute_to": now,
    }
    reads = {
        "read_windows": {"model": "m", "version": 1, **spans},
        "series": {"model": "m", "versions": [1, 2], "grain": "hour", "since": now - timedelta(days=7), "until": now},
    }
    with transaction() as conn:
        for name, params in reads.items():
            plan = str(conn.execute("explain (format json) " + windows.SQL[name], params).fetchall())
            assert "request_event" not in plan, name
            assert "Seq Scan" not in plan, (name, plan)
        # closing one batch does not read the month either
        send(make(5, minutes=0))
        near = {"since": now - timedelta(minutes=2), "until": now + timedelta(minutes=2)}
        params = {"batches": [uuid.uuid4()], **near}
        plan = str(conn.execute("explain (format json) " + windows.SQL["events"], params).fetchall())
        assert "Seq Scan" not in plan, plan
        assert len(windows.series(conn, "m", [1, 2], now - timedelta(days=7), now, "hour")) > 300
