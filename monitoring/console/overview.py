"""The first page: all models at a glance."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from infra.db import Connection, transaction
from monitoring.console import strips, traffic
from monitoring.console.figures import number
from monitoring.console.render import RANGES, SQL, Visit, draw


def models(visit: Visit) -> Response:
    """Who serves, how much, how fast, at what cost, and whether it still fits: one card a model."""
    with transaction() as conn:
        found = [_card(conn, row) for row in conn.execute(SQL["models"]).fetchall()]
        alerts = conn.execute(SQL["alerts_open"], {"model": None}).fetchall()
    return draw(visit, "overview.html", models=found, alerts=alerts, open_alerts=len(alerts))


def _card(conn: Connection, row: dict[str, Any]) -> dict[str, Any]:
    # A young model's whole traffic lies in a shorter range than a day, which shows more of its course.
    shown = traffic.natural_range(conn, row["name"])
    day = traffic.read(conn, row["name"], RANGES[shown])
    return {
        **row,
        "range": shown,
        "day": day.total,
        "spark": strips.sparkline(
            [bucket.requests for bucket in day.buckets[: day.times.whole]],
            title=f"Requests to {row['name']} over the last {shown}: {number(day.total.requests)}",
            height=44,
        ),
    }
