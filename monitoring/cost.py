"""What a model costs: each version's tokens or machine time, by day, by key, and for each request; what making it cost,
how much energy that was, and what the month will come to.

The gateway prices every request when it records it (registry/pricing.py), by the price of that day, so a price
that changes later changes no past.
"""

from __future__ import annotations

import math
from calendar import monthrange
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from infra.db import Connection, load_queries, one
from infra.settings import get_settings
from monitoring import windows
from monitoring.windows import Window
from registry.languages import NAMES

SQL = load_queries(Path(__file__).with_suffix(".sql"))

_WEEKS = timedelta(days=28)  # that a forecast is made from
_FEWEST_LENGTHS = 20  # requests of a language, by which what its tokens cover is told
_FEWEST_DAYS = 3


def report(conn: Connection, model: str, versions: Sequence[int], since: datetime, until: datetime) -> dict[str, Any]:
    """Cost in US dollars between two times (to the minute; `days` and `keys` are of whole UTC days): of all versions
    together, of each, of each by day, and by key. `priced_by` says by what: "tokens" or "machine". A version's `making`
    is what its run took of the machine, and what that adds to each of the requests that it ever answered; `languages`
    has what `languages` says of those that were answered; `month` is `forecast`'s, of the model."""
    spans = {version: windows.read(conn, model, version, since, until) for version in versions}
    making = _making(conn, model, versions)
    whole = windows.total(spans.values())
    days: dict[int, list[dict[str, Any]]] = {version: [] for version in versions}
    for point in windows.series(conn, model, versions, since, until, "day"):
        days[point.version].append({"day": _day(point.start).isoformat(), **figures(point.window)})
    return {
        "model": model,
        "since": since,
        "until": until,
        "currency": "USD",
        **price_of(conn, model),
        **figures(whole),
        "languages": languages(whole),
        "versions": [
            {"version": v, **figures(window), "making": making.get(v), "days": days[v]} for v, window in spans.items()
        ],
        "keys": conn.execute(
            SQL["keys"],
            {"model": model, "versions": list(versions), "since": _day(since), "until": _day(until)},
        ).fetchall(),
        "month": forecast(conn, model, until),
    }


def _making(conn: Connection, model: str, versions: Sequence[int]) -> dict[int, dict[str, Any]]:
    """By version: the machine's seconds of its run, dollars at the machine's price, and a thousand requests' share of
    these, spread over all that it ever answered; what a thousand requests cost with its base alone, and after how many
    what it saves of that has paid for making it; where there is no such number, why. Several machines of one run count
    as one."""
    hour = price_of(conn, model)["price"].get("per_machine_hour_usd", get_settings().machine_usd_per_hour)
    found: dict[int, dict[str, Any]] = {}
    for row in conn.execute(SQL["making"], {"model": model, "versions": list(versions)}):
        usd = row["seconds"] / 3600 * hour
        share = 1000 * usd / row["requests"] if row["requests"] else None
        requests, why = _break_even(usd, hour, row["base_usd"], row["own_usd"])
        found[row["version"]] = {
            "seconds": row["seconds"],
            "usd": usd,
            "usd_per_1000_requests": share,
            "base_usd_per_1000_requests": row["base_usd"],
            "requests_to_break_even": requests,
            "no_break_even": why,
        }
    return found


def _break_even(usd: float, hour: float, base: float | None, own: float | None) -> tuple[int | None, str | None]:
    """After how many requests `usd` are saved, by what a thousand cost with the base and with the version; or why there
    is no such number, in a few words."""
    if not hour:
        return None, "the machine has no price"
    if not usd:
        return None, "nothing was spent: it was not made here"
    if base is None or own is None:
        return None, "not known: add `cost` to its evaluation's suites"
    if own >= base:
        return None, "never: the base costs less" if own > base else "never: the base costs the same"
    return math.ceil(1000 * usd / (base - own)), None


def languages(window: Window) -> list[dict[str, Any]]:
    """What each language takes of a window, those of most tokens first: requests, tokens of prompts and answers and
    their share, dollars, and how many characters of a request a token covers (fewer: the same text is dearer): the
    slope of a line (least squares) through requests' lengths, so that what all prompts have, such as a system prompt,
    does not count; None where they are too few, or all of one length."""
    found: list[dict[str, Any]] = []
    for place, name in enumerate(NAMES):
        of = {what: window.languages.get(f"{place}:{what}", 0) for what in windows.LANGUAGES}
        if not of["requests"]:
            continue
        found.append(
            {
                "language": name,
                "requests": of["requests"],
                "tokens": of["tokens"],
                "usd": of["cost_nano_usd"] / 1e9,
                "characters_per_token": _characters_per_token(of),
            }
        )
    tokens = sum(each["tokens"] for each in found)
    ordered = sorted(found, key=lambda each: -each["tokens"])
    return [{**each, "share": each["tokens"] / tokens if tokens else None} for each in ordered]


def _characters_per_token(of: Mapping[str, int]) -> float | None:
    n, x, y = of["fit_n"], of["fit_x"], of["fit_y"]
    along, spread = n * of["fit_xy"] - x * y, n * of["fit_xx"] - x * x
    return spread / along if n >= _FEWEST_LENGTHS and along > 0 and spread > 0 else None


def forecast(conn: Connection, model: str, now: datetime) -> dict[str, Any]:
    """What the UTC month of `now` has cost, and will have cost at its end, with a 95 % interval::

        {"from": date, "days": in the month, "spent", "expected", "low", "high", "by": what it is made from,
         "limit": what `tunesmith limit --usd-per-month` allows, or None}

    The days to come are taken to be like those of the last four weeks: like those of their own weekday where there are
    two weeks of them, whose spread is then that within weekdays. `expected` is null on fewer than three full days.
    """
    today = _day(now)
    first, days = today.replace(day=1), monthrange(today.year, today.month)[1]
    asked = {"model": model, "since": min(first, today - _WEEKS), "until": today}
    by_day = {row["day"]: float(row["usd"]) for row in conn.execute(SQL["by_day"], asked)}
    spent = sum(usd for day, usd in by_day.items() if day >= first)
    allowed = conn.execute(SQL["monthly_limit"], {"model": model}).fetchone()
    body = {"from": first.isoformat(), "days": days, "spent": spent, "expected": None, "low": None, "high": None}
    body |= {"limit": float(allowed["amount"]) if allowed else None}
    began = max(min(by_day, default=today), today - _WEEKS)
    full = [began + timedelta(days=n) for n in range((today - began).days)]
    if len(full) < _FEWEST_DAYS:
        return body | {"by": f"{len(full)} full days so far, too few to say"}
    weekly = len(full) >= 14
    groups: dict[int, list[float]] = {}
    for day in full:
        groups.setdefault(day.weekday() if weekly else 0, []).append(by_day.get(day, 0.0))
    means = {key: sum(values) / len(values) for key, values in groups.items()}
    spread = sum((value - means[key]) ** 2 for key, values in groups.items() for value in values)
    variance = spread / max(1, len(full) - len(groups))
    left = [today + timedelta(days=n) for n in range(1, days - today.day + 1)]
    gone = (now - windows.floor(now, "day")) / timedelta(days=1)
    rest_of_today = means[today.weekday() if weekly else 0] * (1 - gone)
    expected = spent + rest_of_today + sum(means[day.weekday() if weekly else 0] for day in left)
    # The days to come vary, and so do the means that they are taken to have: Student's prediction interval
    to_come: dict[int, float] = {today.weekday() if weekly else 0: 1 - gone}
    for day in left:
        to_come[day.weekday() if weekly else 0] = to_come.get(day.weekday() if weekly else 0, 0.0) + 1
    of_means = sum(n**2 / len(groups[key]) for key, n in to_come.items())
    reach = _student(len(full) - len(groups)) * math.sqrt(variance * (sum(to_come.values()) + of_means))
    return body | {
        "expected": expected,
        "low": max(spent, expected - reach),
        "high": expected + reach,
        "by": f"the last {len(full)} full days" + (", by weekday" if weekly else ""),
    }


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy import special

    return float(special.stdtrit(max(1, freedom), 0.975))


def _day(at: datetime) -> date:
    return at.astimezone(UTC).date()


def energy_kwh(engine_seconds: float) -> float:
    """Of the machine while its engine worked, at what the settings say it draws then; idle time is nobody's."""
    return engine_seconds / 3600 * get_settings().machine_watts / 1000


def break_even(conn: Connection, model: str, version: int) -> Mapping[str, Any] | None:
    """What the version's evaluation says of a hosted model's price, where it was measured beside one."""
    row = conn.execute(SQL["evaluation"], {"model": model, "version": version}).fetchone()
    found: Mapping[str, Any] | None = (row["cost"] or {}).get("break_even_per_day") if row else None
    return found


def figures(window: Window) -> dict[str, Any]:
    """Cost of a window; what is per something is null when there was nothing."""
    usd, tokens = window.cost_usd, window.prompt_tokens + window.completion_tokens
    return {
        "requests": window.requests,
        "prompt_tokens": window.prompt_tokens,
        "completion_tokens": window.completion_tokens,
        "engine_seconds": window.engine_seconds,
        "energy_kwh": energy_kwh(window.engine_seconds),
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
