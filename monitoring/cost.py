"""What a model costs: each version's tokens or machine time, by day, and for each request.

The gateway prices every request when it records it (registry/pricing.py), by the price of that day, so a price
that changes later changes no past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from infra.db import Connection, load_queries, one
from infra.settings import get_settings
from monitoring import windows
from monitoring.windows import Window

SQL = load_queries(Path(__file__).with_suffix(".sql"))


def report(conn: Connection, model: str, versions: Sequence[int], since: datetime, until: datetime) -> dict[str, Any]:
    """Cost in US dollars between two times (to the minute; `days` are whole UTC days): of all versions together, of
    each, and of each by day. `priced_by` says by what: "tokens" or "machine"."""
    spans = {version: windows.read(conn, model, version, since, until) for version in versions}
    days: dict[int, list[dict[str, Any]]] = {version: [] for version in versions}
    for point in windows.series(conn, model, versions, since, until, "day"):
        days[point.version].append({"day": point.start.date().isoformat(), **figures(point.window)})
    return {
        "model": model,
        "since": since,
        "until": until,
        "currency": "USD",
        **price_of(conn, model),
        **figures(windows.total(spans.values())),
        "versions": [{"version": v, **figures(window), "days": days[v]} for v, window in spans.items()],
    }


def figures(window: Window) -> dict[str, Any]:
    """Cost of a window; what is per something is null when there was nothing."""
    usd, tokens = window.cost_usd, window.prompt_tokens + window.completion_tokens
    return {
        "requests": window.requests,
        "prompt_tokens": window.prompt_tokens,
        "completion_tokens": window.completion_tokens,
        "engine_seconds": window.engine_seconds,
        "usd": usd,
        "usd_per_request": usd / window.requests if window.requests else None,
        "usd_per_1000_requests": 1000 * usd / window.requests if window.requests else None,
        "usd_per_1000_tokens": 1000 * usd / tokens if tokens else None,
    }


def price_of(conn: Connection, model: str) -> Mapping[str, Any]:
    """The price that is in force: the model's own, else the machine's of the settings."""
    price = one(conn, SQL["price"], {"model": model})["price"] or {
        "per_machine_hour_usd": get_settings().machine_usd_per_hour
    }
    return {"priced_by": "machine" if "per_machine_hour_usd" in price else "tokens", "price": price}
