"""From a verdict to a retraining: the guards, the request, and the start of the flow.

A drift episode (the time its alert is open) asks for at most one retraining. The request is written in the same
transaction as what led to it; the flow is started afterwards, with the request's id as idempotency key, so a crash
in between starts it once all the same.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from infra import prefect
from infra.db import Connection, load_queries, one, transaction
from infra.durations import parse_duration
from infra.errors import NotFound, TunesmithError
from monitoring import alerts, feedback

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

_MIN_ROWS = 200
_COOLDOWN = timedelta(hours=24)


def consider(
    conn: Connection,
    model: str,
    version: int,
    verdict: uuid.UUID,
    settings: Mapping[str, Any],
    body: Mapping[str, Any],
) -> None:
    """Ask for a retraining because of a drift verdict on the champion, or say once what stands against it.

    Guards: ``retrain.on`` is drift; nothing was asked in this episode; what the verdict's `body` says it comes of is
    something that training helps against; no run of the model is in progress; the last request is at least
    ``retrain.cooldown`` ago; at least ``retrain.min_rows`` corrections of kept requests came since it.
    """
    policy = settings.get("retrain") or {}
    opened_at = alerts.open_since(conn, model, version, "drift")
    if policy.get("on") != "drift" or opened_at is None:
        return
    conn.execute(SQL["lock"], {"model": model})
    last_asked = one(conn, SQL["last_asked"], {"model": model})["at"]
    if last_asked is not None and last_asked >= opened_at:
        return
    against = _against(conn, model, policy, last_asked)
    against = _no_help(body) or against
    newest = conn.execute(SQL["newest"], {"model": model}).fetchone()
    waiting = newest if newest and newest["state"] == "refused" and newest["at"] >= opened_at else None
    if against is None:
        reason = f"Drift on {model}:{version} since {opened_at:%Y-%m-%d %H:%M:%S %Z}."
        _insert(conn, model, verdict, "asked", reason)
        log.info("retraining of %s asked for: %s", model, reason)
    elif waiting is None:
        _insert(conn, model, verdict, "refused", against)
        log.info("no retraining of %s yet: %s", model, against)
    elif waiting["reason"] != against:
        conn.execute(SQL["update_reason"], {"id": waiting["id"], "reason": against})


def _no_help(body: Mapping[str, Any]) -> str | None:
    """Why training does not help against a drift, in a sentence; None where it may."""
    if body["attribution"]["cause"] == "judge":
        return "Only the scores changed, of like answers to like requests by the same version: look at who scores."
    if not any(f["drifted"] and (f["side"] != "output" or f["name"] == "mean_logprob") for f in body["features"]):
        return "Only the answers changed, not what is asked nor what people say of them: look at version and engine."
    return None


def _against(conn: Connection, model: str, policy: Mapping[str, Any], last_asked: Any) -> str | None:
    """The guard that says no, in a sentence."""
    running = conn.execute(SQL["running"], {"model": model}).fetchone()
    if running is not None:
        return f"A run of {model} is in progress ({running['holder']})."
    cooldown = parse_duration(policy["cooldown"]) if "cooldown" in policy else _COOLDOWN
    if last_asked is not None and one(conn, SQL["now"])["now"] < last_asked + cooldown:
        return f"The last retraining was asked for less than {policy.get('cooldown', '24h')} ago."
    least = int(policy.get("min_rows", _MIN_ROWS))
    rows = feedback.usable_corrections(conn, model, last_asked)
    if rows < least:
        return f"{rows} of the {least} corrections that retraining needs have come."
    return None


def _insert(conn: Connection, model: str, verdict: uuid.UUID, state: str, reason: str) -> None:
    conn.execute(
        SQL["insert"], {"id": uuid.uuid4(), "model": model, "verdict": verdict, "state": state, "reason": reason}
    )


def start_asked() -> int:
    """Start the flows that were asked for; returns how many. What cannot start yet, because Prefect is away or the
    model's retrain flow is not set up, stays asked for and says why."""
    with transaction() as conn:
        asked = conn.execute(SQL["asked"]).fetchall()
    started = 0
    for request in asked:
        try:
            flow_run = start(request["model"], request["id"])
        except TunesmithError as error:
            if request["error"] != error.message:
                log.warning("retraining of %s waits: %s", request["model"], error.message)
                with transaction() as conn:
                    conn.execute(SQL["waits"], {"id": request["id"], "error": error.message})
            continue
        with transaction() as conn:
            conn.execute(SQL["started"], {"id": request["id"], "flow_run_id": flow_run})
        log.info("retraining of %s started as flow run %s", request["model"], flow_run)
        started += 1
    return started


def start(model: str, request: uuid.UUID | None = None) -> str:
    """Start a model's retrain flow, once for one request; returns the flow run's id. Raises NotFound when no run ever
    set it up, Unreachable when Prefect is away."""
    try:
        deployment = prefect.call("GET", f"/deployments/name/retrain/{model}")
    except NotFound as error:
        raise NotFound(
            f"The model {model} has no retrain flow.",
            hint="Add a `retrain:` section to its pipeline file and run it once.",
        ) from error
    asked = str(request) if request is not None else None
    body: dict[str, Any] = {"parameters": {"model": model, "request": asked}, "state": {"type": "SCHEDULED"}}
    if asked is not None:
        body["idempotency_key"] = asked
    return str(prefect.call("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])
