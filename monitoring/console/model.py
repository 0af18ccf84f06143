"""A model: its traffic with the ledger drawn over it, its versions side by side, the canary that runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup
from starlette.responses import Response

from infra.db import one, transaction
from infra.errors import NotFound
from monitoring import figures
from monitoring.console import charts, overview, strips, traffic
from monitoring.console.render import RANGES, SQL, Visit, draw
from registry import deployments, rollouts
from registry.deployments import Deployment, Entry
from registry.names import check_model_name
from registry.statistics import Estimate

# Shown first, when a version has them; the rest stands on the version's own page.
HEADLINES = ("loss", "exact_match", "token_f1", "chrf", "rouge_l", "p95_latency_ms", "tokens_per_second")
_COLUMNS = 4


def show(visit: Visit) -> Response:
    """Traffic, latency and cost over time, versions, ledger, alerts."""
    name = check_model_name(visit.path("model"))
    with transaction() as conn:
        now = deployments.read(conn, name)
        state = overview.state(one(conn, SQL["models"], {"model": name}))
        since = visit.since(traffic.natural_range(conn, name))
        entries = deployments.history(conn, name)
        versions = conn.execute(SQL["versions"], {"model": name, "number": None}).fetchall()
        verdicts = {row["version"]: row for row in conn.execute(SQL["last_verdicts"], {"model": name})}
        alerts = conn.execute(SQL["alerts_open"], {"model": name}).fetchall()
        flow = traffic.read(conn, name, RANGES[since])
        behind = conn.execute(SQL["replicas_behind"], {"model": name}).fetchall()
        try:
            rollout: rollouts.Rollout | None = rollouts.newest(conn, name)
        except NotFound:
            rollout = None
    metrics = columns(versions)
    return draw(
        visit,
        "model.html",
        model=name,
        now=now,
        state=state,
        since=since,
        entries=list(reversed(entries)),
        served_by=next((e for e in reversed(entries) if e.slot == "champion"), None) if now.champion else None,
        alerts=alerts,
        behind=behind,
        rollout=rollout if rollout is not None and recent(rollout, RANGES[since]) else None,
        flow=flow,
        charts=pictures(flow, entries),
        metrics=metrics,
        versions=[_row(v, now, verdicts, flow) for v in versions],
        intervals=_intervals(versions, metrics),
    )


def recent(rollout: rollouts.Rollout, span: timedelta) -> bool:
    """Whether it runs, or ended within the time that the page is about."""
    return rollout.ended_at is None or rollout.ended_at > datetime.now(UTC) - span


def columns(versions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics to stand side by side: known to some version, headlines first."""
    known = {name for v in versions for name in (v["estimates"] or v["metrics"] or {})}
    return [*(m for m in HEADLINES if m in known), *sorted(known - set(HEADLINES))][:_COLUMNS]


def _row(v: Mapping[str, Any], now: Deployment, verdicts: Mapping[int, Any], flow: traffic.Traffic) -> dict[str, Any]:
    return {
        **v,
        "slot": now.slot_of(v["number"]),
        "gate_decision": v["gate"]["decision"] if v["gate"] else None,
        "reasons": v["gate"].get("reasons", []) if v["gate"] else [],
        "verdict": verdicts.get(v["number"]),
        "look": look(v["number"]),
        "traffic": flow.by_version.get(v["number"]),
    }


def look(number: int) -> str:
    """A version's colour, the same on every page."""
    return f"c{(number - 1) % charts.PALETTE}"


def _intervals(versions: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[tuple[int, str], dict[str, Any]]:
    """(version, metric) -> estimate and its drawing; a column's intervals share one scale."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for name in metrics:
        estimates = {v["number"]: _estimate(v, name) for v in versions}
        ends = [x for e in estimates.values() if e for x in (e.low, e.high) if math.isfinite(x)]
        for number, e in estimates.items():
            if e is None:
                continue
            tip = (
                f"{figures.words(name)} of version {number}\n{figures.metric(e.estimate, name)}  "
                f"({figures.metric(e.low, name)} – {figures.metric(e.high, name)}, {e.n} rows)"
            )
            drawing = strips.interval(e, domain=(min(ends), max(ends)), zero=None, tip=tip) if ends else Markup("")
            found[number, name] = {"estimate": e, "drawing": drawing}
    return found


def _estimate(v: Mapping[str, Any], name: str) -> Estimate | None:
    """From the evaluation; or, of an imported version, the bare headline number."""
    if both := (v["estimates"] or {}).get(name):
        return Estimate.from_json(both["candidate"])
    value = (v["metrics"] or {}).get(name)
    if not isinstance(value, int | float):
        return None
    return Estimate(estimate=float(value), low=-math.inf, high=math.inf, n=0, higher_is_better=True)


def pictures(flow: traffic.Traffic, entries: Sequence[Entry]) -> dict[str, Markup]:
    """What traffic is drawn as, by name, with the ledger's entries marked."""
    times = flow.times
    marks = [
        charts.Mark(
            at=e.at,
            label=f"v{e.to_version}" if e.to_version else f"{e.slot} off",
            tip=f"{e.action}: {e.slot} v{e.from_version or '–'} → v{e.to_version or '–'}\n{figures.stamp(e.at)}\n"
            f"{e.actor}\n{e.reason[:120]}",
            look=e.action,
        )
        for e in entries
        if times.since <= e.at <= times.until
    ]
    by_version = [
        charts.Series(name=f"v{number}", values=[float(b.requests) or None for b in buckets], look=look(number))
        for number, buckets in flow.series.items()
    ]
    every = flow.buckets
    return {
        "requests": charts.bars(
            key="requests", title="Requests, by version", note=f"per {flow.step}", times=times, series=by_version,
            write=figures.number, marks=marks, spans=_served(entries, times),
        ),
        "latency": charts.lines(
            key="latency", title="Latency", times=times, write=figures.milliseconds, marks=marks, band=(0, 1),
            series=[
                charts.Series(name="p50", values=[b.p50 for b in every], look="p50"),
                charts.Series(name="p95", values=[b.p95 for b in every], look="p95"),
                charts.Series(name="p99", values=[b.p99 for b in every], look="p99"),
            ],
        ),
        "ttft": charts.lines(
            key="ttft", title="Time to first token", times=times, write=figures.milliseconds, band=(0, 1), marks=marks,
            series=[
                charts.Series(name="p50", values=[b.ttft_p50 for b in every], look="p50"),
                charts.Series(name="p95", values=[b.ttft_p95 for b in every], look="p95"),
            ],
        ),
        "cost": charts.lines(
            key="cost", title="Cost per 1,000 requests", times=times, write=figures.usd, marks=marks,
            series=[charts.Series(name="Cost", values=[b.cost_per_1000 for b in every])],
        ),
        "spent": charts.bars(
            key="spent", title="Cost", note=f"per {flow.step}", times=times, write=figures.usd, marks=marks, least=0.0,
            series=[charts.Series(name="Cost", values=[b.cost_usd for b in every])],
        ),
        "errors": charts.bars(
            key="errors", title="Errors", note=f"per {flow.step}", times=times, write=figures.number, marks=marks,
            series=[charts.Series(name="Errors", values=[float(b.errors) for b in every], look="errors")],
        ),
        "tokens": charts.lines(
            key="tokens", title="Answer length", note="mean tokens", times=times, write=figures.number, marks=marks,
            series=[charts.Series(name="Tokens", values=[b.mean_completion_tokens for b in every], look="c2")],
        ),
    }  # fmt: skip


def _served(entries: Sequence[Entry], times: charts.Times) -> list[charts.Span]:
    """Which version was champion when, cut to the chart's range."""
    spans: list[charts.Span] = []
    changes = [e for e in entries if e.slot == "champion" and e.to_version is not None]
    for index, e in enumerate(changes):
        end = changes[index + 1].at if index + 1 < len(changes) else datetime.now(UTC)
        if end > times.since and e.at < times.until and e.to_version is not None:
            spans.append(
                charts.Span(
                    since=max(e.at, times.since),
                    until=min(end, times.until),
                    label=f"v{e.to_version}",
                    look=look(e.to_version),
                )
            )
    return spans


def differences(metrics: Mapping[str, Any], against: str) -> list[dict[str, Any]]:
    """A forest: the candidate's difference to champion or base, metric by metric, each on its own scale round zero
    (units differ), coloured by whether the interval is clear of zero on the good side, the bad side, or neither."""
    found = []
    for name, both in metrics.items():
        if not both.get(f"vs_{against}") or not both.get(against):
            continue
        e = Estimate.from_json(both[f"vs_{against}"])
        reach = max((abs(x) for x in (e.estimate, e.low, e.high) if math.isfinite(x)), default=1.0) * 1.1 or 1.0
        better, worse = (e.low > 0, e.high < 0) if e.higher_is_better else (e.high < 0, e.low > 0)
        tone = "good" if better else "bad" if worse else "plain"
        tip = (
            f"{figures.words(name)}, difference to the {against}\n{figures.signed(e.estimate)}  "
            f"({figures.signed(e.low)} to {figures.signed(e.high)}, {round(100 * e.level)} % interval)"
        )
        found.append(
            {
                "name": name,
                "candidate": Estimate.from_json(both["candidate"]),
                "other": Estimate.from_json(both[against]),
                "difference": e,
                "tone": tone,
                "words": {"good": "better", "bad": "worse", "plain": "unclear"}[tone],
                "drawing": strips.interval(e, domain=(-reach, reach), tone=tone, tip=tip),
            }
        )
    order = {name: i for i, name in enumerate(HEADLINES)}
    return sorted(found, key=lambda d: order.get(d["name"], 99))
