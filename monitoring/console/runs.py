"""Runs and their searches, with the ways into Prefect and MLflow."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from starlette.responses import RedirectResponse, Response

from infra.db import transaction
from infra.errors import NotFound
from infra.settings import get_settings
from monitoring.console import studies
from monitoring.console.render import SQL, Visit, draw
from registry.studies import jobs

STAGES = ("prepare", "search", "evaluate", "register")


def listing(visit: Visit) -> Response:
    """Newest first."""
    with transaction() as conn:
        rows = conn.execute(SQL["runs"], {"model": visit.query("model") or None}).fetchall()
    return draw(visit, "runs.html", rows=rows, stages=STAGES, prefect=prefect_page(), now=datetime.now(UTC))


def show(visit: Visit) -> Response:
    """One run: its stages, its search trial by trial, what came out."""
    try:
        key = UUID(visit.path("id"))
    except ValueError as error:
        raise NotFound("That is not a run's id.", hint="See the list of runs.") from error
    with transaction() as conn:
        run = conn.execute(SQL["run"], {"id": key}).fetchone()
        if run is None:
            raise NotFound(f"There is no run {key}.", hint="See the list of runs.")
        stages = conn.execute(SQL["stages"], {"id": key}).fetchall()
        study = conn.execute(SQL["study"], {"study": run["study"]}).fetchone() if run["study"] else None
        trials = conn.execute(SQL["trials"], {"study": run["study"]}).fetchall() if study else []
        begun = jobs(conn, run["study"]) if study else []
    return draw(
        visit,
        "run.html",
        run=run,
        stages={s["name"]: s for s in stages},
        order=STAGES,
        study=study,
        **(studies.table(study, trials, begun) if study else {}),
        prefect=prefect_page(),
        now=datetime.now(UTC),
    )


def prefect_page() -> str | None:
    """Where Prefect's pages are; None when no server is known."""
    url = get_settings().prefect_url
    return url.rstrip("/").removesuffix("/api") if url else None


def to_mlflow(visit: Visit) -> Response:
    """To a run's page in MLflow, which alone knows the page's address, or to one of its artifacts.

    Raises Unreachable, NotFound.
    """
    from registry.mlflow import run_url  # asked when the link is followed, so that pages do not wait for MLflow

    run_id = visit.path("run_id")
    if not run_id.isalnum() or len(run_id) > 64:
        raise NotFound("That is not an MLflow run's id.")
    artifact = "/artifacts/search/index.html" if visit.query("show") == "search" else ""
    return RedirectResponse(run_url(run_id) + artifact, 303)
