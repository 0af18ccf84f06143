"""monitor, drift, cost and alerts as a person types them."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

import pytest
import traffic
from click.testing import CliRunner
from psycopg.types.json import Jsonb

from deploy import recorder
from infra.db import transaction
from infra.errors import NotFound, UsageError
from infra.settings import Settings
from monitoring import alerts, commands, feedback, windows
from registry.evidence import keep_evidence

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
    assert result["versions"][0]["making"] == {
        "seconds": 0.0, "usd": 0.0, "usd_per_1000_requests": 0.0, "base_usd_per_1000_requests": None,
        "requests_to_break_even": None, "no_break_even": "nothing was spent: it was not made here",
    }  # fmt: skip


def test_languages_share_the_cost_and_a_version_pays_off(database: Settings) -> None:
    asked = [("where is my order and when will it be here", "a"), ("wo ist mein Paket und wann ist es hier", "b")]
    with transaction() as conn:
        traffic.register(conn, "m", 3, PROFILE, settings={}, champion=False)
        costs = [{"candidate": {"estimate": own}, "base": {"estimate": 0.06}} for own in (0.02, 0.07)]
        cheaper, dearer = (
            keep_evidence(conn, "evaluation", {"metrics": {"cost_per_1000_usd": cost}}) for cost in costs
        )
        for number, kept in ((1, cheaper), (2, dearer)):
            run_id = uuid.uuid4()
            conn.execute(
                "insert into run (id, model, kind, state, fingerprint, config, config_path, token)"
                " values (%s, 'm', 'train', 'completed', '', '{}', '', 1)",
                (run_id,),
            )
            took = "insert into stage (run_id, name, output, seconds) values (%s, 'search', '{}', 3600)"
            conn.execute(took, (run_id,))
            conn.execute(
                "insert into version (model, number, bundle_digest, base_digest, method, manifest, profile, run_id,"
                " evaluation) values ('m', %s, 'sha256:v', 'sha256:b', 'lora', '{}', %s, %s, %s)",
                (number, Jsonb(PROFILE.to_json()), run_id, kept),
            )
        traffic.serve(conn, "m", 1)
        events = [
            traffic.event("m", 1, PROFILE, (" ".join([question] * (1 + n % 7)), answer))
            for n in range(30)
            for question, answer in [asked[0]] * 3 + [asked[1]]
        ]
        recorder.store(conn, uuid.uuid4(), events)
        windows.close(conn)
    result = json.loads(run(commands.cost, "m", "--json"))
    english, german = result["languages"]
    assert [(each["language"], each["requests"]) for each in (english, german)] == [("English", 90), ("German", 30)]
    assert english["tokens"] + german["tokens"] == result["prompt_tokens"] + result["completion_tokens"]
    assert (english["usd"], english["share"] + german["share"]) == (pytest.approx(0.009), pytest.approx(1))
    # Of the words alone: each request also has twenty tokens that are the same in all
    each = len(asked[1][0]) / traffic.tokens(asked[1][0])
    assert german["characters_per_token"] == pytest.approx(each, rel=0.1)
    made = result["versions"][0]["making"]
    assert made["base_usd_per_1000_requests"] == 0.06
    assert made["requests_to_break_even"] == math.ceil(made["usd"] / (0.06 - 0.02) * 1000)
    assert "German" in run(commands.cost, "m")
    made = json.loads(run(commands.cost, "m:2", "--json"))["versions"][0]["making"]
    assert made["requests_to_break_even"] is None
    assert made["no_break_even"] == "never: the base costs less"
    assert "never: the base" in " ".join(run(commands.cost, "m:2").split())


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
