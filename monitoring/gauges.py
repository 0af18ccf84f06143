"""What the database knows of models, for Prometheus: what serves, open alerts, drift, and today's traffic and cost.

What one gateway does is in its own /metrics; this is the same whichever gateway is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.db import Connection, load_queries

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

SQL = load_queries(Path(__file__).with_suffix(".sql"))


def text(conn: Connection) -> bytes:
    """All of it in Prometheus's text format."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Read(list(_families(conn))))
    return generate_latest(registry)


class _Read:
    """Families that were read already, as prometheus_client asks for them."""

    def __init__(self, families: list[GaugeMetricFamily]) -> None:
        self.families = families

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self.families


def _families(conn: Connection) -> Iterable[GaugeMetricFamily]:
    from prometheus_client.core import GaugeMetricFamily

    def family(name: str, about: str, labels: list[str], query: str, value: str | None) -> GaugeMetricFamily:
        found = GaugeMetricFamily(f"tunesmith_{name}", about, labels=labels)
        for row in conn.execute(SQL[query]):
            found.add_metric([str(row[label]) for label in labels], _number(row[value]) if value else 1.0)
        return found

    of_version = ["model", "version"]
    yield family("alert_open", "1 for each open alert.", [*of_version, "rule", "severity", "cause"], "alerts", None)
    yield family("champion", "The number of the version that serves.", ["model"], "serving", "champion")
    yield family("deployment_generation", "How often the deployment was changed.", ["model"], "serving", "generation")
    yield family("drift", "1 drift, 0 stable, -1 too few requests to tell.", of_version, "drift", "verdict")
    held = "For how long the watcher's lease still holds; below zero nobody watches."
    yield family("watcher_lease_seconds", held, [], "watcher", "seconds")
    yield family("requests_today", "Requests since midnight UTC.", of_version, "today", "requests")
    yield family("errors_today", "Of them with a status of 500 or more.", of_version, "today", "errors")
    yield family("cost_usd_today", "What they cost.", of_version, "today", "cost_usd")


def _number(value: Any) -> float:
    return float({"drift": 1, "stable": 0, "too_few": -1}.get(value, value))
