"""Alerts: what is open and what was, and one alert's story, with what it is about drawn beside the ledger."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from infra.db import transaction
from infra.errors import NotFound
from monitoring import alerts, figures, story
from monitoring.console import examples, traffic
from monitoring.console.drift import label
from monitoring.console.model import pictures
from monitoring.console.render import RANGES, SQL, Visit, draw
from registry import deployments, statistics

# Which chart shows a rule's figure
_CHARTS = {"error_rate": "errors", "cost_usd": "spent", "budget": "spent"}


def listing(visit: Visit) -> Response:
    """What is open, what was, and which retrains were asked for."""
    with transaction() as conn:
        opened = conn.execute(SQL["alerts_open"], {"model": None}).fetchall()
        closed = conn.execute(SQL["alerts_closed"]).fetchall()
        silences = alerts.silences(conn)
        retrains = conn.execute(SQL["retrains"], {"model": None}).fetchall()
    return draw(
        visit, "alerts.html", opened=opened, closed=closed, retrains=retrains, open_alerts=len(opened),
        silences=silences,
    )  # fmt: skip


def show(visit: Visit) -> Response:
    """Since when, what changed shortly before, which part grew, what to do, and where to look."""
    now = datetime.now(UTC)
    with transaction() as conn:
        alert = conn.execute(SQL["alert"], {"id": _id(visit.path("id"))}).fetchone()
        if alert is None:
            raise NotFound("There is no such alert any more.", hint="See /alerts.")
        model = alert["model"]
        told = story.of(conn, alert, now)
        shown_requests = examples.read(conn, visit, model, alert["version"], alert["details"].get("examples", []))
        # The smallest range that begins before it opened
        shown = next((name for name, span in RANGES.items() if now - span < told.since), "30d")
        flow = traffic.read(conn, model, RANGES[shown])
        drawn = pictures(flow, deployments.history(conn, model))
        silences = [s for s in alerts.silences(conn) if s["model"] == model and s["rule"] in (None, alert["rule"])]
    return draw(
        visit,
        "alert.html",
        alert=alert,
        said=alerts.said(alert, told.advice),
        model=model,
        story=told,
        silences=silences if alert["closed_at"] is None else [],
        shown=shown,
        chart=drawn[_chart(alert["rule"])] if flow.total.requests else None,
        details=list(_details(alert)),
        examples=shown_requests,
        requests=_requests(alert, shown),
    )


def _id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise NotFound("There is no such alert.", hint="See /alerts.") from error


def _chart(rule: str) -> str:
    metric = rule.split(" ")[0]
    return _CHARTS.get(metric, "ttft" if "ttft" in metric else "latency" if "latency" in metric else "requests")


def _details(alert: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the rule saw, in its own measures: what the sentences above leave out."""
    found, metric = alert["details"], alert["rule"].partition(" ")[0]
    for name, value in found.items():
        if name in ("value", "limit"):
            yield figures.words(name), alerts.in_words(metric, value)
        elif name in ("score", "reference", "difference"):
            yield figures.words(name), statistics.in_words(value) or figures.DASH
        elif isinstance(value, str | int):
            yield figures.words(name), value
    for f in found.get("features", ()):
        if isinstance(f, str):  # of an alert from before the statistics were kept
            continue
        numbers = f"{figures.number(f['value'])} ({f['statistic']}), threshold {figures.number(f['threshold'])}"
        yield label(f["name"]), numbers


def _requests(alert: Mapping[str, Any], shown: str) -> str:
    """Where the requests that it is about are listed."""
    asked = {"model": alert["model"], "since": shown}
    if alert["version"]:
        asked["version"] = alert["version"]
    if alert["rule"].startswith("error_rate"):
        asked["status"] = "error"
    return "/requests?" + urlencode(asked)
