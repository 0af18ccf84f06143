"""Flow runs whose process is gone: Prefect shows them as running for ever and keeps their slot, until told."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import psycopg

from infra import prefect, processes
from infra.db import load_queries
from infra.settings import Settings

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)
_OPEN = ["RUNNING", "PENDING", "CANCELLING"]


def reconcile(settings: Settings, *, own_pool: bool) -> int:
    """Mark dead flow runs as crashed, which frees their slots at once; returns how many.

    Dead is a flow run of our ``run`` table whose model's lease expired or is held by a process of this machine
    that is gone (its lease is ended too, so that the run can be resumed at once). With `own_pool`, to be said only
    before the runner starts, also every open flow run of our work pool without a living lease: nothing can be
    running it.
    """
    with psycopg.connect(settings.database(), autocommit=True, connect_timeout=5) as conn:
        for name, holder, token, held in conn.execute(SQL["held_leases"]).fetchall():
            if processes.is_gone(holder, held):
                conn.execute(SQL["end_lease"], {"name": name, "token": token})
        living = {str(row[0]) for row in conn.execute(SQL["living_flow_runs"])}
        ours = {str(row[0]) for row in conn.execute(SQL["unfinished_flow_runs"])}
    call = partial(prefect.call, "POST", settings=settings, seconds=10)
    state = {"state": {"type": {"any_": _OPEN}}}
    dead = set()
    if ours - living:
        found = call("/flow_runs/filter", {"flow_runs": {**state, "id": {"any_": sorted(ours - living)}}})
        dead |= {run["id"] for run in found}
    if own_pool:
        pool = {"work_pools": {"name": {"any_": [settings.work_pool]}}}
        dead |= {run["id"] for run in call("/flow_runs/filter", {"flow_runs": state, **pool})} - living
    for run in sorted(dead):
        crashed = {"type": "CRASHED", "name": "Crashed", "message": "Its process is gone; the next run resumes it."}
        call(f"/flow_runs/{run}/set_state", {"state": crashed, "force": True})
        log.info("flow run %s was dead and is marked as crashed", run)
    return len(dead)
