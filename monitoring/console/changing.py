"""Changing what serves: promote, roll back, a canary in steps. Each asks why, beside what the change rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from starlette.responses import RedirectResponse, Response

from deploy.auth import check_force
from infra.db import Connection, transaction
from infra.errors import NotFound, Refused, TunesmithError, UsageError
from monitoring.console import model
from monitoring.console.render import SQL, Visit, draw, whole
from registry import approvals, deployments, rollouts
from registry.names import check_model_name, parse_share


def promote_form(visit: Visit) -> Response:
    return _ask(visit, _number(visit), None)


def promote(visit: Visit) -> Response:
    """Raises NotAllowed for an override that is no admin's."""
    number, force = _number(visit), visit.form.get("force") == "yes"
    check_force(visit.identity, force)
    return _change(visit, number, lambda conn, name, who: deployments.promote(conn, name, number, force=force, **who))


def rollout_form(visit: Visit) -> Response:
    return _ask(visit, _number(visit), None, "rollout")


def begin_rollout(visit: Visit) -> Response:
    """A canary in steps."""
    number = _number(visit)

    def begin(conn: Connection, name: str, who: dict[str, Any]) -> None:
        plan = rollouts.Plan(
            steps=tuple(parse_share(part) for part in visit.form.get("steps", "").split(",")),
            min_requests=_count(visit.form.get("requests", "")),
        )
        rollouts.begin(conn, name, number, plan, **who)

    return _change(visit, number, begin, "rollout")


def rollback_form(visit: Visit) -> Response:
    return _ask(visit, None, None)


def rollback(visit: Visit) -> Response:
    """`to` is optional."""
    to = visit.form.get("to", "")
    number = whole(to, "version") if to else None
    return _change(visit, None, lambda conn, name, who: deployments.rollback(conn, name, to=number, **who))


def stop_challenger(visit: Visit) -> Response:
    """The champion has all of the traffic again; a canary in steps ends by that. Whatever generation it is at: who
    presses stop means it."""
    name = check_model_name(visit.path("model"))
    with transaction() as conn:
        deployments.stop(conn, name, "challenger", actor=visit.actor, reason="stopped in the console")
    return RedirectResponse(f"/models/{name}", 303)


def _change(
    visit: Visit,
    number: int | None,
    act: Callable[[Connection, str, dict[str, Any]], object],
    kind: Literal["promote", "rollout"] = "promote",
) -> Response:
    """Compare-and-set on the generation the person saw; what refuses it is told in the form that they came from."""
    name = check_model_name(visit.path("model"))
    try:
        generation = whole(visit.form.get("generation", ""), "generation")
        who = {"actor": visit.actor, "reason": visit.form.get("reason", ""), "expect_generation": generation}
        with transaction() as conn:
            act(conn, name, who)
    except TunesmithError as error:
        if error.http_status in (400, 409, 412):
            return _ask(visit, number, error, kind)
        raise
    return RedirectResponse(f"/models/{name}", 303)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{text[:40]!a} is no number of requests.", hint="Such as 100.")
    return int(text)


def _ask(
    visit: Visit, number: int | None, error: TunesmithError | None, kind: Literal["promote", "rollout"] = "promote"
) -> Response:
    """The form that asks for a reason: of a promotion or a canary in steps of `number`, or (None) of a rollback. After
    a conflict it shows what serves now, and carries the current generation."""
    name = check_model_name(visit.path("model"))
    with transaction() as conn:
        now = deployments.read(conn, name)
        earlier = _earlier(conn, name)
        asked = number
        if number is None:
            if not earlier:
                raise Refused(f"No other version of {name} has served, so nothing can be rolled back to.")
            number = int(visit.form.get("to") or visit.query("to") or 0) if _digits(visit) else 0
            number = number or earlier[0]
        chosen = conn.execute(SQL["versions"], {"model": name, "number": number}).fetchone()
        if chosen is None:
            raise NotFound(f"There is no version {name}:{number}.", hint=f"See `tunesmith versions {name}`.")
        agreed = approvals.of(conn, name, number)
    against = "champion" if model.differences(chosen["estimates"] or {}, "champion") else "base"
    return draw(
        visit,
        "change.html",
        error.http_status if error else 200,
        kind="rollback" if asked is None else kind,
        model=name,
        number=number,
        now=now,
        earlier=earlier,
        error=error,
        gate=chosen["gate"],
        agreed=agreed,
        differences=model.differences(chosen["estimates"] or {}, against),
        against=against,
        reason=visit.form.get("reason", ""),
        forced=visit.form.get("force") == "yes",
        may_force=visit.allows("admin"),
        steps=visit.form.get("steps") or ", ".join(f"{100 * share:g}%" for share in rollouts.Plan().steps),
        requests=visit.form.get("requests") or rollouts.Plan().min_requests,
    )


def _digits(visit: Visit) -> bool:
    text = visit.form.get("to") or visit.query("to")
    return not text or (text.isascii() and text.isdigit() and len(text) < 10)


def _number(visit: Visit) -> int:
    return whole(visit.path("number"), "version")


def _earlier(conn: Connection, name: str) -> list[int]:
    """The versions that served before, the one a rollback would bring back first."""
    entries = [e for e in deployments.history(conn, name) if e.slot == "champion" and e.to_version is not None]
    now = deployments.read(conn, name).champion
    stood = deployments.standing((e.action, e.to_version) for e in entries)
    order = [*reversed(stood[:-1]), *(e.to_version for e in reversed(entries) if e.to_version is not None)]
    return [n for n in dict.fromkeys(order) if n != now]
