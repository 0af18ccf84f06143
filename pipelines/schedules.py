"""Schedules are Prefect deployments of the flows `train` and `rescore`; made by Prefect, else spoken to over HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from infra.errors import Conflict, NotFound, UsageError
from infra.prefect import call

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_RESCORE = "rescore/"  # before a model's name; no schedule of a person's has a slash
_PAUSED = "The schedule is paused."


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
    check_times(cron, timezone)
    if _exists(f"/deployments/name/train/{name}"):
        raise Conflict(f"There is already a schedule {name}.", hint=f"`tunesmith schedule remove {name}` first.")
    from pipelines import flows  # Prefect's import costs a second

    flows.deploy_schedule(name, config=config, overrides=overrides, cron=cron, timezone=timezone)
    return get(name)


def check_times(cron: str, timezone: str) -> None:
    """Raises UsageError for a cron expression that is none or never comes, or no time zone."""
    from cronsim import CronSim, CronSimError

    example = 'Such as --cron "0 2 * * 1" --timezone Europe/Berlin.'
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UsageError(f"There is no time zone {timezone[:80]!r}.", hint=example) from error
    try:
        if len(cron.split()) != 5:
            raise CronSimError("it must have five fields: minute, hour, day, month, weekday")
        next(CronSim(cron, datetime.now(zone)))
    except CronSimError as error:
        raise UsageError(f"{cron[:80]!r} is not a cron expression: {error}.", hint=example) from error
    except StopIteration:
        raise UsageError(f"{cron!r} never comes.", hint=example) from None


def ensure_retrain(model: str) -> None:
    """Make the deployment that a drift verdict starts, unless it is there."""
    if not _exists(f"/deployments/name/retrain/{model}"):
        from pipelines import flows

        flows.deploy_retrain(model)


def ensure_rescore(model: str, cron: str | None) -> None:
    """Have what serves a model asked its golden set again at these times (UTC), or no more. One that is there with the
    same times stays as it is, paused or not."""
    try:
        there = call("GET", f"/deployments/name/rescore/{model}")
    except NotFound:
        there = None
    if there is not None and cron is None:
        call("DELETE", f"/deployments/{there['id']}")
    elif cron is not None and (there is None or _describe(there)["cron"] != cron):
        from pipelines import flows

        flows.deploy_rescore(model, cron)


def list_schedules() -> list[dict[str, Any]]:
    """All schedules, by name; those of golden sets are called ``rescore/MODEL``."""
    found = call("POST", "/deployments/filter", {"flows": {"name": {"any_": ["train", "rescore"]}}, "limit": 200})
    return sorted((_describe(d) for d in found), key=lambda s: str(s["name"]))


def get(name: str) -> dict[str, Any]:
    """One schedule; raises NotFound."""
    return _describe(_deployment(name))


def pause(name: str) -> dict[str, Any]:
    """No run of it begins any more until it is resumed, the ones that are queued included; one that runs goes on."""
    deployment = _deployment(name)
    call("POST", f"/deployments/{deployment['id']}/pause_deployment")
    for run in _runs(deployment, ["SCHEDULED", "PENDING"]):
        if run["auto_scheduled"]:
            _end(run["id"], "CANCELLED", _PAUSED)
    return get(name)


def resume(name: str) -> dict[str, Any]:
    call("POST", f"/deployments/{_deployment(name)['id']}/resume_deployment")
    return get(name)


def remove(name: str) -> dict[str, Any]:
    """Take a schedule away. Raises Conflict while a run of it is going on, whose record in Prefect would break; it is
    paused then. Raises UsageError for a golden set's, which its pipeline file makes."""
    if name.startswith(_RESCORE):
        raise UsageError(
            f"{name[:80]} stands in the pipeline file of {name.removeprefix(_RESCORE)[:80]}, and would come back.",
            hint="Take monitoring.rescore out of it and run it, or pause the schedule.",
        )
    gone = get(name)
    pause(name)
    deployment = _deployment(name)
    if busy := _runs(deployment, ["RUNNING", "PENDING", "CANCELLING"]):
        raise Conflict(
            f"A run of {name} is going on ({busy[0]['name']}); the schedule is paused, but still there.",
            hint="Remove it when the run has ended, or cancel that run in Prefect's page.",
        )
    call("DELETE", f"/deployments/{deployment['id']}")
    return gone


def trigger(name: str) -> dict[str, Any]:
    """Start a run now; returns its id, name and state."""
    run = call("POST", f"/deployments/{_deployment(name)['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    return {"flow_run_id": run["id"], "name": run["name"], "state": run["state"]["type"].lower()}


def why_not(flow_run_id: str) -> str | None:
    """What stands against a slot of a schedule that is about to run: of missed slots only the newest runs, and none
    of a schedule that was paused meanwhile. None for the go-ahead, and for all that no schedule started."""
    run = call("GET", f"/flow_runs/{flow_run_id}")
    if not run["auto_scheduled"] or run["deployment_id"] is None or run["expected_start_time"] is None:
        return None
    if call("GET", f"/deployments/{run['deployment_id']}")["paused"]:
        return _PAUSED
    later = call(
        "POST",
        "/flow_runs/filter",
        {
            "deployments": {"id": {"any_": [run["deployment_id"]]}},
            "flow_runs": {
                "expected_start_time": {"after_": run["expected_start_time"], "before_": datetime.now(UTC).isoformat()},
                "id": {"not_any_": [run["id"]]},
            },
            "limit": 50,
        },
    )
    if any(r["auto_scheduled"] and r["expected_start_time"] > run["expected_start_time"] for r in later):
        return "A later slot of this schedule is due: only the newest missed slot runs."
    return None


def crash(flow_run_id: str, message: str) -> None:
    """Say that a flow run's process is dead: Prefect would leave it Running for ever and hold its slot."""
    try:
        run = call("GET", f"/flow_runs/{flow_run_id}")
        if run["state"] and run["state"]["type"] in ("RUNNING", "PENDING", "CANCELLING"):
            _end(flow_run_id, "CRASHED", message)
    except NotFound:
        pass  # deleted in Prefect's page


def _deployment(name: str) -> dict[str, Any]:
    flow, own = ("rescore", name.removeprefix(_RESCORE)) if name.startswith(_RESCORE) else ("train", name)
    try:
        found: dict[str, Any] = call("GET", f"/deployments/name/{flow}/{quote(own, safe='')}")
    except NotFound as error:
        raise NotFound(f"There is no schedule {name}.", hint="See `tunesmith schedule list`.") from error
    return found


def _exists(path: str) -> bool:
    try:
        call("GET", path)
    except NotFound:
        return False
    return True


def _end(flow_run_id: str, kind: str, message: str) -> None:
    body = {"state": {"type": kind, "message": message}, "force": True}
    call("POST", f"/flow_runs/{flow_run_id}/set_state", body)


def _runs(deployment: Mapping[str, Any], states: list[str]) -> list[dict[str, Any]]:
    body = {
        "deployments": {"id": {"any_": [deployment["id"]]}},
        "flow_runs": {"state": {"type": {"any_": states}}},
        "limit": 200,
    }
    found: list[dict[str, Any]] = call("POST", "/flow_runs/filter", body)
    return found


def _describe(deployment: Mapping[str, Any]) -> dict[str, Any]:
    schedule: dict[str, Any] = next((s["schedule"] for s in deployment["schedules"]), {})
    runs = call(
        "POST",
        "/flow_runs/filter",
        {
            "deployments": {"id": {"any_": [deployment["id"]]}},
            "flow_runs": {"start_time": {"is_null_": False}},
            "sort": "START_TIME_DESC",
            "limit": 1,
        },
    )
    parameters = deployment["parameters"]
    return {
        "name": deployment["name"] if "config" in parameters else _RESCORE + deployment["name"],
        "config": parameters.get("config"),
        "overrides": parameters.get("overrides", []),
        "cron": schedule.get("cron"),
        "timezone": schedule.get("timezone"),
        "paused": deployment["paused"],
        "last_run": _last(runs[0]) if runs else None,
        "next_run": None if deployment["paused"] else _next(schedule),
    }


def _last(run: Mapping[str, Any]) -> dict[str, Any]:
    """With Prefect's message when it did not go well."""
    state = run["state_type"].lower()
    message = None if state in ("completed", "running", "pending") else (run["state"] or {}).get("message")
    return {"at": _second(datetime.fromisoformat(run["start_time"])), "state": state, "message": message}


def _next(schedule: Mapping[str, Any]) -> str | None:
    """The slot that comes next. Of Prefect's own runs the first may be a slot that waits already."""
    from cronsim import CronSim

    if not schedule.get("cron"):
        return None
    return _second(next(CronSim(schedule["cron"], datetime.now(ZoneInfo(schedule.get("timezone") or "UTC")))))


def _second(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
