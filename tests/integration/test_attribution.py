"""Four incidents, staged on real text: each alert says which of input, model, judge or system moved, and since when."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import traffic
from click.testing import CliRunner
from fastapi.testclient import TestClient

from deploy import recorder
from deploy.auth import create_key
from deploy.gateway import create_app
from infra.db import transaction
from infra.settings import Settings, get_settings
from monitoring import commands, feedback, neighbours, statistics, watch, windows
from monitoring.console.app import console_routes
from registry import datasets, deployments
from registry.datasets import make_row
from registry.profile import FEATURE, FEATURES, Extractor, Profile

SETTINGS: dict[str, Any] = {"monitoring": {"min_requests": 100, "window": "2h", "alerts": [
    {"metric": "p95_latency_ms", "above": 500, "severity": "critical"}]}}  # fmt: skip
_QUIET: dict[str, Any] = {"engine_seconds": 0.05, "latency_ms": 100.0}


@pytest.fixture(scope="module")
def old() -> list[traffic.Pair]:
    return traffic.shuffled(traffic.worlds()[0], 7)


@pytest.fixture(scope="module")
def profile(old: list[traffic.Pair]) -> Profile:
    return traffic.profile(old[:900], old[900:1060])


@pytest.fixture
def model(database: Settings, profile: Profile) -> str:
    """Two versions alike, of which the first has served for a day."""
    with transaction() as conn:
        for number in (1, 2):
            traffic.register(conn, "m", number, profile, settings=SETTINGS, champion=False)
        deployments.promote(conn, "m", 1, actor="os:ann@here", reason="to begin with", force=True)
        conn.execute("alter table ledger disable trigger user")
        conn.execute("update ledger set at = at - interval '1 day'")
        conn.execute("alter table ledger enable trigger user")
    return "m"


def minutes_ago(minutes: float) -> datetime:
    return windows.floor(datetime.now(UTC), "minute") - timedelta(minutes=minutes)


def came(
    version: int, pairs: list[traffic.Pair], reference: Profile, *, first: int, last: int, **changes: Any
) -> list[dict[str, Any]]:
    """The pairs as requests, spread evenly from some minutes ago to others."""
    begin, step = minutes_ago(first), timedelta(minutes=first - last) / len(pairs)
    keep_text = changes.pop("keep_text", False)
    events = [
        traffic.event("m", version, reference, pair, at=begin + n * step, keep_text=keep_text) | _QUIET | changes
        for n, pair in enumerate(pairs)
    ]
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), events)
    return events


def rated(events: list[dict[str, Any]], liked: float) -> None:
    """Two of three answers are scored; that share of them well."""
    asked = [e for n, e in enumerate(events) if n % 3]
    items = [{"request_id": e["id"], "score": 1 if n % 10 < 10 * liked else -1} for n, e in enumerate(asked)]
    with transaction() as conn:
        feedback.record(conn, [feedback.parse(item) for item in items], model="m")
        conn.execute("update feedback set at = request_at, scored_at = request_at")


def looked(rule: str) -> dict[str, Any]:
    """The open alert of a rule after the watcher's turn, as `tunesmith alerts` tells it."""
    watcher = watch.Watcher("test")
    watcher.turn()
    watcher.release()
    found = json.loads(CliRunner().invoke(commands.alerts, ["m", "--json"]).stdout)["alerts"]
    [alert] = [each for each in found if each["rule"] == rule]
    return dict(alert)


def about(at: str | None, expected: datetime, *, within: float) -> bool:
    """Whether a time is told to so many minutes."""
    return at is not None and abs(datetime.fromisoformat(at) - expected) <= timedelta(minutes=within)


def test_foreign_traffic_is_the_input(model: str, old: list[traffic.Pair], profile: Profile) -> None:
    new = traffic.shuffled(traffic.worlds()[1], 7)
    came(1, old[1060:1360], profile, first=110, last=30)
    foreign = came(1, new[:150], profile, first=30, last=1, keep_text=True)
    alert = looked("drift")
    assert alert["cause"] == "input"
    assert about(alert["began_at"], minutes_ago(30), within=5), alert["began_at"]
    assert set(alert["details"]["examples"]) <= {str(e["id"]) for e in foreign}
    assert len(alert["details"]["examples"]) == 5
    assert "retrain (`tunesmith retrain m`)" in alert["message"]
    assert "It began about" in alert["message"]


def test_a_time_that_is_over_began_when_it_began(model: str, old: list[traffic.Pair], profile: Profile) -> None:
    new = traffic.shuffled(traffic.worlds()[1], 7)
    came(1, old[1060:1160], profile, first=110, last=80)
    came(1, new[:200], profile, first=80, last=30)
    came(1, old[1160:1260], profile, first=30, last=1)
    alert = looked("drift")
    assert alert["cause"] == "input"
    assert about(alert["began_at"], minutes_ago(80), within=5), alert["began_at"]


def test_a_worse_version_is_the_model(model: str, old: list[traffic.Pair], profile: Profile) -> None:
    """It says as much, and as surely, as the one before, but people do not like it."""
    rated(came(1, old[1060:1360], profile, first=600, last=200), 0.9)
    with transaction() as conn:
        deployments.promote(conn, "m", 2, actor="os:ann@here", reason="it looks fine", force=True)
    worse = came(2, old[1360:1560], profile, first=100, last=1)
    rated(worse, 0.4)
    alert = looked("drift")
    assert (alert["version"], alert["cause"]) == (2, "model")
    assert alert["began_at"] is None, "all of its time"
    disliked = alert["details"]["examples"]
    assert len(disliked) == 5
    with transaction() as conn:
        scores = conn.execute("select score from feedback where request_id = any(%s)", (disliked,)).fetchall()
    assert {row["score"] for row in scores} == {-1}
    assert "`tunesmith rollback m`" in alert["message"]


def test_a_changed_judge_is_the_judge(model: str, old: list[traffic.Pair], profile: Profile) -> None:
    """The same version, asked the same, answers the same: who scores it has changed."""
    rated(came(1, old[1060:1360], profile, first=600, last=200), 0.9)
    rated(came(1, old[1360:1480], profile, first=100, last=60), 0.9)
    rated(came(1, old[1480:1660], profile, first=60, last=1), 0.3)
    alert = looked("drift")
    assert alert["cause"] == "judge"
    assert about(alert["began_at"], minutes_ago(60), within=8), alert["began_at"]
    assert "look at who scores" in alert["message"]
    assert "rollback" not in alert["message"]


def test_a_slow_engine_is_the_system(model: str, old: list[traffic.Pair], profile: Profile) -> None:
    came(1, old[1060:1360], profile, first=110, last=12)
    came(1, old[1360:1460], profile, first=12, last=1, engine_seconds=0.6, latency_ms=1200.0)
    alert = looked("p95_latency_ms above")
    assert alert["cause"] == "system"
    assert about(alert["began_at"], minutes_ago(12), within=2), alert["began_at"]
    with transaction() as conn:
        key = create_key(conn, name="v", role="viewer").key
    with TestClient(create_app(get_settings(), routes=console_routes())) as client:
        headers = {"authorization": f"Bearer {key}"}
        page = client.get(f"/alerts/{alert['id']}", headers=headers)
        listed = client.get("/alerts", headers=headers).text
    assert page.status_code == 200
    assert (
        "What changed is <strong>what requests go through: the engine, its machine, the network</strong>, about "
        in page.text
    )
    assert "cause: system" in listed


def test_a_queue_that_more_requests_make_is_the_input(model: str, old: list[traffic.Pair], profile: Profile) -> None:
    came(1, old[1060:1160], profile, first=110, last=12)
    came(1, old[1160:1460], profile, first=12, last=1, latency_ms=1200.0)
    assert looked("p95_latency_ms above")["cause"] == "input"


def test_errors_are_the_systems_unless_a_version_brought_them(
    model: str, old: list[traffic.Pair], profile: Profile
) -> None:
    came(1, old[1060:1160], profile, first=110, last=12)
    came(1, old[1160:1260], profile, first=12, last=1, status=502)
    assert looked("error_rate above")["cause"] == "system"
    with transaction() as conn:
        deployments.promote(conn, "m", 2, actor="os:ann@here", reason="it looks fine", force=True)
    came(2, old[1260:1360], profile, first=12, last=1, status=502)
    assert looked("error_rate above")["version"] == 2
    assert looked("error_rate above")["cause"] == "model"


@pytest.mark.parametrize("name", ["words", "topic", "refusal"])
def test_a_change_is_found_where_it_is_and_nowhere_else(name: str) -> None:
    import numpy as np

    feature, random = FEATURE[name], np.random.default_rng(3)
    shares = random.dirichlet([1.0] * feature.bins)
    other = np.roll(shares, feature.bins // 3) if feature.bins > 2 else shares[::-1]
    columns = random.multinomial(30, shares, 40)
    _, distance = statistics.of(feature, range(feature.bins))
    assert statistics.change_point(statistics.array(columns), distance) is None
    columns[25:] = random.multinomial(30, other, 15)
    place = statistics.change_point(statistics.array(columns), distance)
    assert place is not None
    assert abs(place - 25) <= 1


def test_a_quiet_series_has_no_change_in_ninety_nine_of_a_hundred() -> None:
    import numpy as np

    random = np.random.default_rng(11)
    feature = FEATURE["words"]
    _, distance = statistics.of(feature, range(feature.bins))
    shares = random.dirichlet([1.0] * feature.bins)
    found = [
        statistics.change_point(statistics.array(random.multinomial(20, shares, 30)), distance, seed=n) is not None
        for n in range(200)
    ]
    assert sum(found) <= 7  # the 99th percentile of a binomial of 200 at 1.5 %


def test_a_request_without_its_text_is_shown_beside_the_row_nearest_to_it(database: Settings, home: Any) -> None:
    rows = [
        make_row([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}])
        for text in (
            "pay 12 euros",
            "WHERE IS MY PARCEL?",
            "please tell me at length how opening hours came about",
            "they can walk",
        )
    ]
    kept = datasets.keep({"train": rows, "validation": [], "test": []}, counts={}, sources=[], recipe={})
    profile = Profile(histograms={}, places={"stroll": (2.0, 0.0, 0.0, 0.0), "walk": (2.1, 0.0, 0.0, 0.0)})
    extractor = Extractor(profile)
    for asked, expected in (("pay 20 euros", 0), ("WHERE ARE MY SHOES?", 1), ("one stroll", 3)):
        pair = (asked, "")
        features = extractor.features(traffic.messages(pair), traffic.answer(pair), 5)
        assert len(features) == len(FEATURES)
        found = neighbours.nearest(kept.digest, features, profile)
        assert found is not None
        assert found.id == rows[expected].id
    assert neighbours.nearest(kept.digest, [float("nan")] * 5, profile) is None
