"""Schedules are Prefect deployments of the `train` flow; spoken to over plain HTTP, except for their creation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from infra.errors import Conflict, NotFound, UsageError
from infra.prefect import call

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def check_reachable() -> None:
    """Raises Unreachable when Prefect's server does not answer: its own client says so in a hundred lines."""
    call("GET", "/health")


def add(name: str, config: str, overrides: list[str], cron: str, timezone: str) -> dict[str, Any]:
    """Make a schedule; its file is read anew at each run.

    Raises UsageError for a wrong name, cron expression or time zone, Conflict when the name is taken: replacing a
    deployment would silently un-pause it.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} cannot name a schedule.", hint=f"Names match {_NAME.pattern}.")
    if _exists(f"/deployments/name/train/{name}"):
        raise Conflict(f"There is already a schedule {name}.", hint=f"`tunesmith schedule remove {name}` first.")
    from pipelines import flows  # Prefect's import costs a second

    flows.deploy_schedule(name, config=config, overrides=overrides, cron=cron, timezone=timezone)
    return get(name)


def ensure_retrain(model: str) -> None:
    """Make the deployment that a drift verdict starts, unless it is there."""
    if not _exists(f"/deployments/name/retrain/{model}"):
        from pipelines import flows

        flows.deploy_retrain(model)


def list_schedules() -> list[dict[str, Any]]:
    """All schedules, by name."""
    found = call("POST", "/deployments/filter", {"flows": {"name": {"any_": ["train"]}}, "limit": 200})
    return sorted((_describe(d) for d in found), key=lambda s: str(s["name"]))


def get(name: str) -> dict[str, Any]:
    """One schedule; raises NotFound."""
    return _describe(_deployment(name))


def pause(name: str) -> dict[str, Any]:
    call("POST", f"/deployments/{_deployment(name)['id']}/pause_deployment")
    return get(name)


def resume(name: str) -> dict[str, Any]:
    call("POST", f"/deployments/{_deployment(name)['id']}/resume_deployment")
    return get(name)


def remove(name: str) -> dict[str, Any]:
    gone = get(name)
    call("DELETE", f"/deployments/{_deployment(name)['id']}")
    return gone


def trigger(name: str) -> dict[str, Any]:
    """Start a run now; returns its id, name and state."""
    run = call("POST", f"/deployments/{_deployment(name)['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    return {"flow_run_id": run["id"], "name": run["name"], "state": run["state"]["type"].lower()}


def superseded(flow_run_id: str) -> bool:
    """Whether a later slot of the same schedule is due as well: of missed slots only the newest runs."""
    run = call("GET", f"/flow_runs/{flow_run_id}")
    if not run["auto_scheduled"] or run["deployment_id"] is None or run["expected_start_time"] is None:
        return False
    later = call(
        "POST",
        "/flow_runs/filter",
        {
            "deployments": {"id": {"any_": [run["deployment_id"]]}},
            "flow_runs": {
                "expected_start_time": {"after_": run["expected_start_time"], "before_": _now()},
                "id": {"not_any_": [run["id"]]},
            },
            "limit": 50,
        },
    )
    return any(r["auto_scheduled"] and r["expected_start_time"] > run["expected_start_time"] for r in later)


def crash(flow_run_id: str, message: str) -> None:
    """Say that a flow run's process is dead: Prefect would leave it Running for ever and hold its slot."""
    try:
        run = call("GET", f"/flow_runs/{flow_run_id}")
        if run["state"] and run["state"]["type"] in ("RUNNING", "PENDING", "CANCELLING"):
            body = {"state": {"type": "CRASHED", "message": message}, "force": True}
            call("POST", f"/flow_runs/{flow_run_id}/set_state", body)
    except NotFound:
        pass  # deleted in Prefect's page


def _deployment(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = call("GET", f"/deployments/name/train/{quote(name, safe='')}")
    except NotFound as error:
        raise NotFound(f"There is no schedule {name}.", hint="See `tunesmith schedule list`.") from error
    return found


def _exists(path: str) -> bool:
    try:
        call("GET", path)
    except NotFound:
        return False
    return True


def _describe(deployment: Mapping[str, Any]) -> dict[str, Any]:
    schedule = next(iter(deployment["schedules"]), None)
    runs = call(
        "POST",
        "/flow_runs/filter",
        {
            "deployments": {"id": {"any_": [deployment["id"]]}},
            "flow_runs": {"start_time": {"is_null_": False}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 1,
        },
    )
    coming = call(
        "POST",
        "/flow_runs/filter",
        {
            "deployments": {"id": {"any_": [deployment["id"]]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": 1,
        },
    )
    parameters = deployment["parameters"]
    return {
        "name": deployment["name"],
        "config": parameters.get("config"),
        "overrides": parameters.get("overrides", []),
        "cron": schedule["schedule"].get("cron") if schedule else None,
        "timezone": schedule["schedule"].get("timezone") if schedule else None,
        "paused": deployment["paused"],
        "last_run": {"at": runs[0]["start_time"], "state": runs[0]["state_type"].lower()} if runs else None,
        "next_run": coming[0]["expected_start_time"] if coming else None,
    }


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat()
