"""What Prometheus is told of models, and that the rules and the dashboard ask for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
import traffic
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from deploy import recorder
from deploy.metrics import Metrics
from infra.db import transaction
from infra.settings import Settings
from monitoring import alerts, gauges, windows
from monitoring.alerts import Finding
from registry import leases

FILES = Path(__file__).parents[2] / "infra" / "observability"
_OTHERS = {"up"}
_FUNCTIONS = {"max", "sum", "by", "rate", "increase", "histogram_quantile", "le"}


def told() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with transaction() as conn:
        text = gauges.text(conn).decode()
    return {
        (sample.name.removeprefix("tunesmith_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_what_serves_and_what_is_wrong_is_told(database: Settings) -> None:
    assert told() == {}
    profile = traffic.profile([], [])
    with transaction() as conn:
        traffic.register(conn, "m", 3, profile, settings={})
        events = [traffic.event("m", 3, profile, ("f(x)", "x"), status=status) for status in (200, 200, 502)]
        recorder.store(conn, uuid.uuid4(), events)
        windows.close(conn)
        hostile = 'drift "\n'
        alerts.apply(conn, "m", 3, [Finding(rule=hostile, state="over", message="!", cause="input")])
        conn.execute(
            "insert into verdict (id, model, version, since, until, verdict, body)"
            " values (gen_random_uuid(), 'm', 3, now(), now(), 'drift', '{}')"
        )
        leases.acquire(conn, "watch", "here:1 watch", 30)
    found = told()
    assert found.pop(of("cost_usd_today", model="m", version="3")) == pytest.approx(3e-4)
    assert 0 < found.pop(of("watcher_lease_seconds")) <= 30
    assert found == {
        of("alert_open", model="m", version="3", rule=hostile, severity="warning", cause="input"): 1,
        of("champion", model="m"): 3,
        of("deployment_generation", model="m"): 1,
        of("drift", model="m", version="3"): 1,
        of("requests_today", model="m", version="3"): 3,
        of("errors_today", model="m", version="3"): 1,
    }


def known() -> set[str]:
    with transaction() as conn:
        families = list(gauges._families(conn))
    names = {family.name for family in families} | _OTHERS
    for family in Metrics().registry.collect():
        names |= {family.name, f"{family.name}_total", f"{family.name}_bucket", f"{family.name}_count"}
    return names


def asked_for(expression: str) -> set[str]:
    """Names of metrics in a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|by \([^)]*\)", "", expression)
    return set(re.findall(r"[a-z_]{2,}", bare)) - _FUNCTIONS


def test_rules_and_dashboard_ask_for_what_there_is(database: Settings) -> None:
    rules: Any = YAML(typ="safe").load(FILES / "alerts.yaml")
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((FILES / "grafana.json").read_text())
    expressions += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 12
    for expression in expressions:
        assert asked_for(expression) <= known(), expression
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in board["panels"]})


def lost(given: Any, kept: Any, at: str = "") -> list[str]:
    """Where one JSON value holds what another has not, or has otherwise."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [each for name in given for each in lost(given[name], kept.get(name), f"{at}.{name}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [each for n, pair in enumerate(zip(given, kept, strict=True)) for each in lost(*pair, f"{at}[{n}]")]
    return [] if given == kept else [at]


def test_the_dashboard_is_of_grafanas_schema() -> None:
    """Read and written by the types that Grafana makes of its schema, it loses nothing."""
    board = json.loads((FILES / "grafana.json").read_text())

    def through(value: Any) -> Any:
        return json.loads(json.dumps(Dashboard.from_json(value), cls=JSONEncoder))

    assert lost(board, through(board)) == []
    panel = board["panels"][0] | {"gridPosition": {}}
    assert lost({"panels": [panel], "titel": "x"}, through({"panels": [panel], "titel": "x"})) == [
        ".panels[0].gridPosition", ".titel"
    ]  # fmt: skip


@pytest.mark.skipif(not shutil.which("promtool"), reason="Prometheus's own checker is not installed")
def test_prometheus_takes_configuration_and_rules(tmp_path: Path) -> None:
    for file in FILES.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "key").write_text("ts_x")
    for check, name in (("config", "prometheus.yaml"), ("rules", "alerts.yaml")):
        done = subprocess.run(
            ["promtool", "check", check, tmp_path / name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
