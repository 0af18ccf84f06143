"""monitor, drift, cost and alerts as a person types them."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
import traffic
from click.testing import CliRunner

from deploy import recorder
from infra.db import transaction
from infra.errors import NotFound, UsageError
from infra.settings import Settings
from monitoring import alerts, commands, feedback, windows

PAIRS = [(f"math.fn{i}(x, /)", f"Return number {i} of x.") for i in range(150)]
PROFILE = traffic.profile(PAIRS, PAIRS)


@pytest.fixture
def model(database: Settings) -> str:
    """150 requests of version 1, 30 failed ones of version 2, one correction, one alert."""
    price = {"per_1k_prompt_tokens_usd": 0.5, "per_1k_completion_tokens_usd": 1.5}
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={"monitoring": {"price": price}})
        traffic.register(conn, "m", 2, PROFILE, settings={}, champion=False)
        good = [
            traffic.event("m", 1, PROFILE, pair, keep_text=True, latency_ms=100.0 + i) for i, pair in enumerate(PAIRS)
        ]
        bad = [traffic.event("m", 2, PROFILE, pair, status=500, slot="pinned") for pair in PAIRS[:30]]
        recorder.store(conn, uuid.uuid4(), good + bad)
        windows.close(conn)
        feedback.record(conn, [feedback.parse({"request_id": good[0]["id"], "score": -1, "correction": "No."})])
        finding = alerts.Finding(rule="drift", state="over", message="moved \x1b[31m[bold]x[/]")
        alerts.apply(conn, "m", 1, [finding])
    return "m"


def run(command: Any, *arguments: str) -> str:
    done = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_monitor(model: str) -> None:
    result = json.loads(run(commands.monitor, "m", "--json"))
    assert (result["version"], result["requests"], result["errors"]) == (1, 150, 0)
    assert result["latency_ms"]["p50"] == pytest.approx(174, rel=0.025)
    assert result["latency_ms"]["p95"] == pytest.approx(241, rel=0.025)
    assert result["tokens_per_second"] == pytest.approx(result["completion_tokens"] / (150 * 0.05))
    assert result["feedback"]["corrections"] == 1
    assert result["feedback"]["mean_score"] == -1
    assert [(v["version"], v["slot"], v["error_rate"]) for v in result["versions"]] == [
        (1, "champion", 0),
        (2, None, 1),
    ]
    assert [v["version"] for v in json.loads(run(commands.monitor, "m:2", "--json"))["versions"]] == [2]
    assert "m:1 (champion)" in run(commands.monitor, "m")


def test_cost(model: str) -> None:
    result = json.loads(run(commands.cost, "m", "--json"))
    assert result["priced_by"] == "tokens"
    assert result["usd"] == pytest.approx(180 * 0.0001)
    assert result["usd_per_1000_requests"] == pytest.approx(0.1)
    assert sum(day["usd"] for v in result["versions"] for day in v["days"]) == pytest.approx(result["usd"])
    one = json.loads(run(commands.cost, "m:2", "--json", "--since", "2h"))
    assert (one["requests"], [v["version"] for v in one["versions"]]) == (30, [2])
    text = run(commands.cost, "m")
    assert "priced by tokens" in text
    assert "too few to say" in text
    assert result["keys"] == [{"key_id": "k", "name": None, "requests": 180, "tokens": result["prompt_tokens"]
                               + result["completion_tokens"], "usd": pytest.approx(0.018)}]  # fmt: skip
    assert result["energy_kwh"] == pytest.approx(result["engine_seconds"] / 3600 * 0.1)
    assert result["versions"][0]["making"] == {"seconds": 0.0, "usd": 0.0, "usd_per_1000_requests": 0.0}


def test_drift_and_alerts_as_text(model: str) -> None:
    text = run(commands.drift, "m")
    assert "m:1 (champion): stable" in text
    assert "m:2: too_few" in text
    assert "unseen_word_share" in text
    listed = run(commands.alerts)
    assert "moved \\x1b[31m[bold]x[/]" in listed, "escapes of a terminal and of ours are shown, not obeyed"
    assert json.loads(run(commands.alerts, "m", "--json"))["alerts"][0]["rule"] == "drift"
    assert json.loads(run(commands.alerts, "other", "--json"))["alerts"] == []
    with transaction() as conn:
        alerts.apply(conn, "m", 1, [alerts.Finding(rule="drift", state="calm")])
    assert "No alert is open" in run(commands.alerts)
    assert "over since" in run(commands.alerts, "--all")


def test_times(model: str) -> None:
    until = traffic.minutes_ago(60).isoformat()
    past = json.loads(run(commands.monitor, "m", "--json", "--until", until, "--since", "90m"))
    assert past["requests"] == 0
    assert past["latency_ms"]["p50"] is None
    assert json.loads(run(commands.monitor, "m", "--json", "--since", until))["requests"] == 150
    for arguments in (["--since", "yesterday"], ["--until", "24h"], ["--since", "2099-01-01T00:00:00Z"]):
        with pytest.raises(UsageError):
            run(commands.monitor, "m", *arguments)
    for ref in ("none", "m:9", "m@challenger"):
        with pytest.raises(NotFound):
            run(commands.drift, ref)
    with pytest.raises(UsageError):
        run(commands.cost, "../x")


@pytest.mark.parametrize("command", [commands.monitor, commands.drift, commands.cost])
def test_a_version_that_does_not_exist(model: str, command: Any) -> None:
    with pytest.raises(NotFound, match="no version m:99"):
        run(command, "m:99")
