"""One version: where it comes from, how it was judged, what the gate said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import HTMLResponse, RedirectResponse, Response

from infra.db import transaction
from infra.errors import NotFound, Refused, TunesmithError
from infra.settings import get_settings
from infra.storage import file_digest
from monitoring.console.model import HEADLINES, differences, look
from monitoring.console.render import SQL, Visit, draw, whole
from monitoring.figures import words
from registry import approvals, card, deployments, judgements, versions
from registry.names import check_model_name
from registry.statistics import Estimate

EXAMPLES, REPORT = 12, "report.html"


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
        agreed = approvals.of(conn, name, number)
        me = approvals.person(conn, visit.actor)
        again = judgements.newest(conn, name, number)
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
        agreed=agreed,
        approved=any(approvals.same(given.person, me) for given in agreed.given),
        estimates=_estimates(evaluation.get("metrics", {})),
        against={who: differences(evaluation.get("metrics", {}), who) for who in ("champion", "base", "hosted")},
        notes=card.notes(evaluation, words),
        slices={
            label: {who: differences(metrics, who) for who in ("champion", "base")}
            for label, metrics in evaluation.get("slices", {}).items()
            if label.startswith("source=")  # the others stand in the report, one line each
        },
        has_report=REPORT in v["manifest"].get("files", {}) or again is not None,
        rows=evaluation.get("rows"),
        suites=evaluation.get("suites", []),
        examples=evaluation.get("examples", [])[:EXAMPLES],
        mlflow_page=_mlflow_page(name, number),
    )


def report(visit: Visit) -> Response:
    """The report of the newest judgement, else the bundle's own. That may have come from elsewhere, so nothing in it
    may run or load anything."""
    name, number = check_model_name(visit.path("model")), whole(visit.path("number"), "version")
    policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
    with transaction() as conn:
        found = versions.get(conn, name, number)
        again = judgements.report(conn, name, number)
    if again is not None:
        return HTMLResponse(again, headers={"content-security-policy": policy})
    if REPORT not in found.parsed.files:
        raise NotFound(f"{found.name} has no report.", hint="Only what a pipeline run judged has one.")
    file = found.folder() / REPORT
    if not file.is_file():
        raise NotFound(
            f"The report of {found.name} is not in the store any more.", hint="`tunesmith verify` says more."
        )
    if (digest := file_digest(file)) != found.parsed.files[REPORT]:
        raise Refused(f"The report of {found.name} has digest {digest}, not the one that it was sealed with.")
    return HTMLResponse(file.read_bytes(), headers={"content-security-policy": policy})


def approve(visit: Visit) -> Response:
    """Agree, as the person of the session, that the version may serve."""
    name, number = check_model_name(visit.path("model")), whole(visit.path("number"), "version")
    role, reason = visit.identity.role if visit.identity else "", visit.form.get("reason", "")
    with transaction() as conn:
        read = visit.form.get("gate") or None
        approvals.approve(conn, name, number, actor=visit.actor, role=role, reason=reason, gate=read)
    return RedirectResponse(f"/models/{name}/versions/{number}", 303)


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
