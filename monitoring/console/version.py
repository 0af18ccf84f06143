"""One version: where it comes from, how it was judged, what the gate said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from infra.db import transaction
from infra.errors import NotFound, TunesmithError
from infra.settings import get_settings
from monitoring.console.model import HEADLINES, differences, look
from monitoring.console.render import SQL, Visit, draw, whole
from registry import deployments
from registry.names import check_model_name
from registry.statistics import Estimate

EXAMPLES = 12


def show(visit: Visit) -> Response:
    """Lineage, evaluation with intervals, slices, examples side by side."""
    name, number = check_model_name(visit.path("model")), whole(visit.path("number"), "version")
    with transaction() as conn:
        now = deployments.read(conn, name)
        v = conn.execute(SQL["version"], {"model": name, "number": number}).fetchone()
        if v is None:
            raise NotFound(f"There is no version {name}:{number}.", hint=f"See `tunesmith versions {name}`.")
        study = conn.execute(SQL["study"], {"study": v["study"]}).fetchone() if v["study"] else None
        verdicts = {row["version"]: row for row in conn.execute(SQL["last_verdicts"], {"model": name})}
        entries = [e for e in deployments.history(conn, name) if number in (e.to_version, e.from_version)]
    evaluation = v["evaluation_body"] or {}
    return draw(
        visit,
        "version.html",
        model=name,
        number=number,
        v=v,
        now=now,
        slot=now.slot_of(number),
        look=look(number),
        study=study,
        verdict=verdicts.get(number),
        entries=list(reversed(entries)),
        gate=v["gate_body"],
        estimates=_estimates(evaluation.get("metrics", {})),
        against={who: differences(evaluation.get("metrics", {}), who) for who in ("champion", "base")},
        slices={
            label: {who: differences(metrics, who) for who in ("champion", "base")}
            for label, metrics in evaluation.get("slices", {}).items()
            if label.startswith("source=")  # the others stand in the report, one line each
        },
        rows=evaluation.get("rows"),
        suites=evaluation.get("suites", []),
        examples=evaluation.get("examples", [])[:EXAMPLES],
        mlflow_page=_mlflow_page(name, number),
    )


def _estimates(metrics: Mapping[str, Any]) -> list[tuple[str, Estimate]]:
    """The candidate's own figures, headlines first."""
    order = {name: i for i, name in enumerate(HEADLINES)}
    found = [(name, Estimate.from_json(both["candidate"])) for name, both in metrics.items() if both.get("candidate")]
    return sorted(found, key=lambda pair: order.get(pair[0], 99))


def _mlflow_page(model: str, number: int) -> str | None:
    if get_settings().mlflow_url is None:
        return None
    from registry.mlflow import version_url  # only when there is a server to link to

    try:
        return version_url(model, number)
    except TunesmithError:
        return None
