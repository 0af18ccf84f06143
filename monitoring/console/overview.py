"""The first page: all models at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from infra.db import Connection, transaction
from monitoring import alerts
from monitoring.console import strips, traffic
from monitoring.console.render import RANGES, SQL, Visit, draw
from monitoring.figures import number


def models(visit: Visit) -> Response:
    """Who serves, how much, how fast, at what cost, and whether it still fits: one card a model."""
    with transaction() as conn:
        found = [_card(conn, row) for row in conn.execute(SQL["models"], {"model": None}).fetchall()]
        opened = conn.execute(SQL["alerts_open"], {"model": None}).fetchall()
    return draw(visit, "overview.html", models=found, alerts=opened, open_alerts=len(opened))


@dataclass(frozen=True, kw_only=True)
class State:
    """The worst that is known of a model, in a word, why, and where that is explained."""

    word: str
    tone: str
    why: str
    link: str


def state(row: Mapping[str, Any]) -> State:
    """Of a row of `models`: *Act* where something is critical or not served as it should be, *Look* at a warning, at
    a gateway that is behind or at drift, else *OK*; mere information is no reason to look."""
    worst, more = row["worst"], row["alerts"] - 1
    if worst and row["urgent"] < 2:
        why = alerts.title(worst["rule"], worst["cause"]) + (f", and {more} more" if more else "")
        word, tone = ("Act", "bad") if row["urgent"] == 0 else ("Look", "warn")
        return State(word=word, tone=tone, why=why, link=f"/alerts/{worst['id']}")
    link = f"/models/{row['name']}/drift"
    if not row["champion"]:
        return State(word="Idle", tone="", why="Nothing serves", link=f"/models/{row['name']}")
    if row["behind"]:
        why = "A gateway has not followed the last change yet"
        return State(word="Look", tone="warn", why=why, link=f"/models/{row['name']}")
    if row["verdict"] == "drift":
        return State(word="Look", tone="warn", why=alerts.title("drift"), link=link)
    told = {"stable": "no drift", "too_few": "too few requests to tell drift"}
    return State(
        word="OK", tone="good", why=f"No warning, {told.get(row['verdict'], 'drift not judged yet')}", link=link
    )


def _card(conn: Connection, row: dict[str, Any]) -> dict[str, Any]:
    # A young model's whole traffic lies in a shorter range than a day, which shows more of its course.
    shown = traffic.natural_range(conn, row["name"])
    day = traffic.read(conn, row["name"], RANGES[shown])
    return {
        **row,
        "state": state(row),
        "range": shown,
        "day": day.total,
        "spark": strips.sparkline(
            [bucket.requests for bucket in day.buckets[: day.times.whole]],
            title=f"Requests to {row['name']} over the last {shown}: {number(day.total.requests)}",
            height=44,
        ),
    }
