"""What a model costs: by version, by day and by key, what making it cost, and what the month will come to."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.responses import Response

from infra.db import transaction
from infra.settings import get_settings
from monitoring import cost, drift, figures
from monitoring.console import charts, traffic
from monitoring.console.model import look
from monitoring.console.render import RANGES, Visit, draw
from registry import deployments
from registry.names import check_model_name


def show(visit: Visit) -> Response:
    """Versions that serve or did, those that cost most first."""
    name, since, until = check_model_name(visit.path("model")), visit.since("30d"), datetime.now(UTC)
    with transaction() as conn:
        now = deployments.read(conn, name)
        serving = {number for number in (now.champion, now.challenger, now.shadow) if number is not None}
        numbers = sorted(serving | set(drift.versions_with_traffic(conn, name, until - RANGES[since], until)))
        report = cost.report(conn, name, numbers, until - RANGES[since], until)
        flow = traffic.read(conn, name, RANGES[since])
        even = cost.break_even(conn, name, now.champion) if now.champion else None
    series = [
        charts.Series(name=f"v{number}", values=[bucket.cost_usd for bucket in buckets], look=look(number))
        for number, buckets in flow.series.items()
    ]
    return draw(
        visit,
        "cost.html",
        model=name,
        now=now,
        since=since,
        report=report,
        versions=sorted(report["versions"], key=lambda v: (-v["usd"], -v["version"])),
        chart=charts.bars(
            key="cost", title="Cost, by version", note=f"per {flow.step}", times=flow.times, series=series,
            write=figures.usd, least=0.0,
        )
        if flow.total.requests
        else None,
        even=even,
        watts=get_settings().machine_watts,
        look=look,
    )  # fmt: skip
