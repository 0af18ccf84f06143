"""What the platform is set to: keys, limits, upstreams, alert rules, and what its disk holds."""

from __future__ import annotations

import time
from functools import lru_cache

from starlette.responses import RedirectResponse, Response

from deploy import budgets
from deploy.auth import NewKey, Role, create_key, list_keys, revoke_key
from infra import storage
from infra.db import one, transaction
from infra.errors import NotFound
from infra.settings import get_settings
from monitoring import alerts
from monitoring.console.render import SQL, Visit, draw
from registry import upstreams

_ROLES: tuple[Role, ...] = ("viewer", "service", "operator", "admin")


def show(visit: Visit) -> Response:
    """All of it to read for everybody who may look; keys for admins alone."""
    return _page(visit, None)


def make_key(visit: Visit) -> Response:
    """The new key's secret stands on the page that this draws, and nowhere else."""
    with transaction() as conn:
        made = create_key(conn, name=visit.form.get("name", ""), role=visit.form.get("role", ""))
    return _page(visit, made)


def end_key(visit: Visit) -> Response:
    """Revoke a key and end its sessions."""
    key = visit.path("id")
    if not key.isalnum() or len(key) > 64:
        raise NotFound("There is no such key.", hint="See the list of keys.")
    with transaction() as conn:
        revoke_key(conn, key)
    return RedirectResponse("/settings", 303)


def _page(visit: Visit, made: NewKey | None) -> Response:
    admin = visit.allows("admin")
    with transaction() as conn:
        keys = list_keys(conn) if admin else []
        limits = budgets.listing(conn)
        addresses = upstreams.listing(conn)
        rules = [
            (row["name"], [(rule, _limit(rule)) for rule in alerts.rules_of(row["settings"])])
            for row in conn.execute(SQL["model_settings"])
        ]
        database = one(conn, "select pg_database_size(current_database()) as bytes")["bytes"]
    return draw(
        visit,
        "settings.html",
        admin=admin,
        made=made,
        roles=_ROLES,
        keys=keys,
        limits=limits,
        upstreams=addresses,
        rules=rules,
        disk=[*sorted(_stored(int(time.monotonic() // 60)).items()), ("database", database)],
        retention=get_settings().event_retention_days,
    )


def _limit(rule: alerts.Rule) -> str:
    if rule.above is not None:
        return f"above {alerts.in_words(rule.metric, rule.above)}"
    return f"below {alerts.in_words(rule.metric, rule.below)}"


@lru_cache(maxsize=1)
def _stored(minute: int) -> dict[str, int]:
    """Walked through once a minute: the store may be large, and on another machine."""
    return storage.used()
