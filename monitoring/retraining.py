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

from infra.db import Connection, load_queries, one, transaction
from infra.durations import parse_duration
from infra.errors import NotFound, TunesmithError, Unreachable
from infra.settings import get_settings
from monitoring import alerts, feedback

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

_MIN_ROWS = 200
_COOLDOWN = timedelta(hours=24)


def consider(conn: Connection, model: str, version: int, verdict: uuid.UUID, settings: Mapping[str, Any]) -> None:
    """Ask for a retraining because of a drift verdict on the champion, or say once what stands against it.

    Guards: ``retrain.on`` is drift; nothing was asked in this episode; no run of the model is in progress; the last
    request is at least ``retrain.cooldown`` ago; at least ``retrain.min_rows`` corrections of kept requests came
    since it.
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
            flow_run = _create_flow_run(request["model"], request["id"])
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


def _create_flow_run(model: str, request: uuid.UUID) -> str:
    deployment = _prefect("GET", f"/deployments/name/retrain/{model}")
    body = {
        "parameters": {"model": model, "request": str(request)},
        "idempotency_key": str(request),
        "state": {"type": "SCHEDULED"},
    }
    return str(_prefect("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])


def _prefect(method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    import httpx

    url = get_settings().need("prefect_url").rstrip("/")
    try:
        answer = httpx.request(method, f"{url}{path}", json=body, timeout=10, trust_env=False)
    except httpx.HTTPError as error:
        raise Unreachable(f"Prefect does not answer at {url}.", hint="See `tunesmith status`.") from error
    if answer.status_code == 404:
        raise NotFound(f"Prefect knows no {path.strip('/')}: the model has no retrain flow.")
    if answer.status_code >= 500:
        raise Unreachable(f"Prefect answered {answer.status_code} to {path}.", hint="See `tunesmith status`.")
    if answer.status_code >= 400:
        raise TunesmithError(f"Prefect refused to start the flow: {answer.text[:300]}")
    return answer.json()
