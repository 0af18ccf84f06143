"""What is told of an alert on errors, latency or cost: what changed before it, which part grew, and what to do."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import traffic

from deploy import recorder
from infra.db import transaction
from infra.settings import Settings
from monitoring import alerts, story, windows
from monitoring.alerts import Finding
from registry import deployments

PAIR = ("f(x)", "Return x.")
PROFILE = traffic.profile([], [])
QUIET: dict[str, Any] = {"engine_seconds": 0.1, "completion_tokens": 10, "prompt_tokens": 30, "latency_ms": 150.0}


@pytest.fixture
def model(database: Settings) -> str:
    with transaction() as conn:
        for number in (1, 2):
            traffic.register(conn, "m", number, PROFILE, settings={}, champion=False)
        deployments.promote(conn, "m", 1, actor="os:ann@here", reason="to begin with", force=True)
        conn.execute("alter table ledger disable trigger user")
        conn.execute("update ledger set at = at - interval '1 day'")
        conn.execute("alter table ledger enable trigger user")
    return "m"


def came(version: int, first: float, last: float, every: int = 2, **changes: Any) -> None:
    """So many requests in each minute from some minutes ago to others."""
    now = windows.floor(datetime.now(UTC), "minute")
    events = [
        traffic.event("m", version, PROFILE, PAIR, at=now - timedelta(minutes=minute, seconds=-n), **(QUIET | changes))
        for minute in range(int(last), int(first) + 1)
        for n in range(every)
    ]
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), events)
        while windows.close(conn).events:
            pass


def told(rule: str, version: int) -> story.Story:
    with transaction() as conn:
        alerts.apply(conn, "m", version, [Finding(rule=rule, state="over", message="It is over.")])
        [alert] = alerts.listing(conn, "m")
        return story.of(conn, alert, datetime.now(UTC))


def test_a_slow_engine(model: str) -> None:
    came(1, 120, 20)
    came(1, 14, 1, every=3, engine_seconds=0.4, latency_ms=900.0)
    found = told("p95_latency_ms above", 1)
    [grown] = [line for line in found.sentences if "times as long" in line]
    assert grown == "The engine takes 4.0 times as long for a token: 40.0 ms, 10.0 before."
    assert any("Look at the machine" in line for line in found.advice)
    assert not any("rollback" in line for line in found.advice), "nothing was promoted"
    assert found.changes == []


def test_a_version_that_answers_longer(model: str) -> None:
    came(1, 120, 20)
    with transaction() as conn:
        deployments.promote(conn, "m", 2, actor="os:ann@here", reason="wordy", force=True)
        conn.execute("alter table ledger disable trigger user")
        conn.execute("update ledger set at = now() - interval '18 minutes' where generation = 2")
        conn.execute("alter table ledger enable trigger user")
    came(2, 14, 1, every=3, engine_seconds=0.35, completion_tokens=35, latency_ms=900.0)
    found = told("p95_latency_ms above", 2)
    assert found.sentences[0] == "18 minutes before it opened, v2 was promoted, by os:ann@here."
    assert "Answers are 3.5 times as long: 35.0 tokens, 10.0 before." in found.sentences
    assert "Did v1 do better?" in found.advice[0]
    assert "`tunesmith rollback m --reason TEXT`" in found.advice[0]
    assert [entry.generation for entry in found.changes] == [2]


def test_more_requests_and_errors_by_status(model: str) -> None:
    came(1, 120, 20)
    came(1, 14, 1, every=5)
    came(1, 10, 8, every=1, status=503, completion_tokens=0)
    found = told("error_rate above", 1)
    assert "Of 3 failed requests 3 ended with 503." in found.sentences
    assert any(line.startswith("2.6 times as many requests come: 5.2 a minute, 2.0 before") for line in found.sentences)
    assert any("`tunesmith status`" in line for line in found.advice)
    assert any("--requests-per-minute" in line for line in found.advice)


def test_copies_are_no_requests_that_came_before(model: str) -> None:
    came(1, 120, 20)
    came(2, 120, 20, slot="shadow", engine_seconds=0.9)
    came(1, 14, 1, every=3, latency_ms=900.0)
    found = told("p95_latency_ms above", 1)
    assert any(line.startswith("1.5 times as many requests come: 3.0 a minute, 2.0 before") for line in found.sentences)
    assert (found.cause, len(found.sentences)) == ("input", 1)


def test_what_costs_more_is_told_over_the_time_that_its_limit_is_of(model: str) -> None:
    """Three times the traffic since ten hours: the last quarter of an hour is as the hours before it."""
    came(1, 48 * 60, 10 * 60, every=1)
    came(1, 10 * 60 - 1, 1, every=3)
    found = told("cost_usd above", 1)
    assert any("times as many requests come" in line for line in found.sentences)
    assert found.cause == "input"


def test_where_nothing_grew_that_is_said(model: str) -> None:
    came(1, 120, 20)
    came(1, 14, 1, latency_ms=900.0)
    found = told("p95_latency_ms above", 1)
    assert len(found.sentences) == 1
    assert found.sentences[0].startswith("Requests are no more and no longer than before")
    assert "a queue, the network" in found.advice[0]


def test_too_little_to_compare_is_said(model: str) -> None:
    came(1, 5, 1, every=1)
    found = told("cost_usd above", 1)
    assert found.sentences == ["0 answers before and 5 since are too few to say what else changed."]
    assert found.since < datetime.now(UTC) - timedelta(minutes=14)
