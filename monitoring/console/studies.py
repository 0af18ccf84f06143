"""Searches: all of them, and one in pictures and trial by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from infra.db import transaction
from infra.errors import NotFound
from monitoring.console import plots, strips
from monitoring.console.render import SQL, Visit, draw
from registry import halving
from registry.studies import Job, jobs


def listing(visit: Visit) -> Response:
    """Newest first."""
    with transaction() as conn:
        rows = conn.execute(SQL["studies"]).fetchall()
    return draw(visit, "studies.html", rows=rows, now=datetime.now(UTC))


def show(visit: Visit) -> Response:
    """One study: its best, its course, and every trial."""
    name = visit.path("name")
    with transaction() as conn:
        study = conn.execute(SQL["study"], {"study": name}).fetchone()
        if study is None:
            raise NotFound(f"There is no study {name[:80]!r}.", hint="See the list of studies.")
        rows = conn.execute(SQL["trials"], {"study": name}).fetchall()
        run = conn.execute(SQL["run_of_study"], {"study": name}).fetchone()
        measured = conn.execute(SQL["measures"], {"study": name}).fetchall()
        begun = jobs(conn, name)
    best = best_of(study, rows)
    trials = [_trial(row, best) for row in rows]
    rungs = study["spec"].get("rungs") or sorted({steps for t in trials for steps, _ in t.course})
    space = study["spec"].get("space", {})
    logs = {n for n, dimension in space.items() if isinstance(dimension, Mapping) and dimension.get("log")}
    return draw(
        visit,
        "study.html",
        study=study,
        run=run,
        **table(study, rows, begun),
        history=plots.history(trials),
        courses=plots.courses(trials, rungs),
        importances=plots.importances((run or {}).get("importances") or {}),
        best=next((row for row in rows if row["trial"] == best), None),
        fronts=plots.fronts(measured, study["spec"].get("objectives", ["loss"]), trials),
        parallel=plots.parallel(trials, logs=logs),
        slices=plots.slices(trials, logs=logs),
        now=datetime.now(UTC),
    )


def best_of(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The trial that won, and until then the one with the lowest loss: the winner is picked by more than that when
    the pipeline file says so."""
    if study["best"]:
        return int(study["best"]["trial"])
    return next((row["trial"] for row in rows if row["value"] is not None), None)


def _trial(row: Mapping[str, Any], best: int | None) -> plots.Trial:
    return plots.Trial(
        number=row["trial"],
        params=row["params"],
        course=list(zip(row["measured_at"] or [], row["course"] or [], strict=True)),
        best=row["trial"] == best,
        failed=row["failed"],
    )


def table(study: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], begun: Sequence[Job]) -> dict[str, Any]:
    """What `trials.html` shows: the trials with the course of their losses and the word for their state that `study
    show` has, by their jobs, and the parameters apart into those that vary and those that do not."""
    trials = [plots.Trial(number=row["trial"], params=row["params"]) for row in rows]
    names = plots.varied(trials) if len(rows) > 1 else sorted({n for row in rows for n in row["params"]})
    fixed = sorted({n for row in rows for n in row["params"]} - set(names))
    values = [value for row in rows for value in row["course"] or []]
    longest = max((len(row["course"] or []) for row in rows), default=0)
    domain = (min(values), max(values)) if values else None
    states = halving.states(halving.Plan.of(study["spec"]), begun, running=study["state"] in ("running", "interrupted"))
    best, shown = best_of(study, rows), []
    for row in rows:
        course = row["course"] or []
        title = f"Validation loss of trial {row['trial']}, rung by rung"
        spark = strips.sparkline([*course, *[None] * (longest - len(course))], title=title, domain=domain)
        shown.append({**row, "spark": spark, "is": states[row["trial"]], "best": row["trial"] == best})
    return {"trials": shown, "names": names, "fixed": [(n, rows[0]["params"].get(n)) for n in fixed]}
