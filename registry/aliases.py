"""What of MLflow follows our registry: a model's aliases, and what the gates of its versions say.

An outbox row is written with each change; the watcher delivers it over plain REST, so that it need not pay for
MLflow's client.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from infra.db import Connection, load_queries, one
from infra.errors import NotFound, TunesmithError, Unreachable
from registry import deployments
from registry.deployments import Deployment
from registry.mlflow import call, rest_client
from registry.names import check_model_name

if TYPE_CHECKING:
    import httpx

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

_TAG, _GATE = "tunesmith.deployment", "tunesmith.gate"
_SECONDS = 4.0  # for one answer; three tries must fit well into the watcher's lease


def deliver(conn: Connection, limit: int = 20) -> int:
    """Set the aliases ``@champion``, ``@challenger`` and ``@shadow`` of models whose deployment changed, a tag that
    says of which generation they are, and one of each version that was judged again; returns of how many models.

    What is written is what the database says now, under a lock per model, so neither order nor repetition
    matters. What fails stays in the outbox and is tried again after 1, 2, 4 ... 300 seconds; nothing is raised for it.
    When MLflow does not answer for one model, none of the others is tried now: this is a step of a loop that has more
    to do. A version that somebody deleted in MLflow cannot be aliased: it is logged, and goes on serving from our own
    store.
    """
    delivered = 0
    for row in conn.execute(SQL["open_models"], {"limit": limit}).fetchall():
        model = str(row["model"])
        if not one(conn, SQL["lock_model"], {"model": model})["locked"]:
            continue  # another process is at it
        newest = one(conn, SQL["newest"], {"model": model})["id"]
        if newest is None:
            continue  # another process did it
        now = deployments.read(conn, model)  # after `newest`: at least as new as all these rows
        try:
            gone = set_aliases(model, _aliases(now), tags={_TAG: _in_words(now)})
            _set_gates(model, {row["number"]: row["decision"] for row in conn.execute(SQL["gates"], {"model": model})})
        except Unreachable as error:
            log.warning("aliases wait, %s's and all others: %s", model, error)
            conn.execute(SQL["postpone_all"], {"error": str(error)[:1000]})
            break
        except TunesmithError as error:
            seconds = min(300.0, 2.0 ** min(row["attempts"], 9))
            log.warning("aliases of %s wait %.0f s: %s", model, seconds, error)
            conn.execute(
                SQL["postpone"], {"model": model, "newest": newest, "error": str(error)[:1000], "seconds": seconds}
            )
            continue
        for number in gone:
            log.warning("%s:%d serves, but was deleted in MLflow; it goes on serving from the store", model, number)
        error_text = f"not in MLflow any more: {gone}" if gone else None
        conn.execute(SQL["done"], {"model": model, "newest": newest, "error": error_text})
        delivered += 1
    return delivered


def reconcile(conn: Connection) -> None:
    """Have `deliver` set all aliases again, for when a hand moved them in MLflow's page."""
    conn.execute(SQL["enqueue_all"])


def drop_old(conn: Connection, days: int) -> None:
    """Forget what was delivered more than `days` days ago."""
    conn.execute(SQL["drop_old"], {"days": days})


def _aliases(now: Deployment) -> dict[str, int | None]:
    return {"champion": now.champion, "challenger": now.challenger, "shadow": now.shadow}


def _in_words(now: Deployment) -> str:
    share = f" at {100 * now.challenger_share:g} %"
    held = [f"{name} {n}{share * (name == 'challenger')}" for name, n in _aliases(now).items() if n is not None]
    return f"generation {now.generation}: {', '.join(held) or 'nothing serves'}"


def set_aliases(model: str, wanted: Mapping[str, int | None], *, tags: Mapping[str, str] | None = None) -> list[int]:
    """Make a registered model's aliases point where `wanted` says, None meaning nowhere, and set its `tags`; others are
    left alone.

    Returns the numbers that MLflow does not have. Raises Unreachable or TunesmithError.
    """
    check_model_name(model)
    gone = []
    with rest_client(_SECONDS) as rest:
        try:
            found = call(rest, "GET", "registered-models/get", {"name": model})["registered_model"]
        except NotFound:
            return [number for number in wanted.values() if number is not None]
        there = {entry["alias"]: str(entry["version"]) for entry in found.get("aliases", [])}
        for alias, number in wanted.items():
            if number is None and alias in there:
                call(rest, "DELETE", "registered-models/alias", {"name": model, "alias": alias})
            elif number is not None and there.get(alias) != str(number):
                body = {"name": model, "alias": alias, "version": str(number)}
                try:
                    call(rest, "POST", "registered-models/alias", body)
                except NotFound:
                    gone.append(number)
                    if alias in there:  # rather no alias than one that names what does not serve
                        call(rest, "DELETE", "registered-models/alias", {"name": model, "alias": alias})
            elif number is not None and not _exists(rest, model, number):
                gone.append(number)
        has = {entry["key"]: entry.get("value") for entry in found.get("tags", [])}
        for key, value in (tags or {}).items():
            if has.get(key) != value:
                call(rest, "POST", "registered-models/set-tag", {"name": model, "key": key, "value": value})
    return gone


def _set_gates(model: str, said: Mapping[int, str]) -> None:
    """The tag of versions, by number, that says what their gates decided; those that MLflow has not are left out."""
    with rest_client(_SECONDS) as rest:
        for number, decision in said.items():
            at = {"name": model, "version": str(number)}
            with contextlib.suppress(NotFound):
                found = call(rest, "GET", "model-versions/get", at)["model_version"]
                if {"key": _GATE, "value": decision} not in found.get("tags", []):
                    call(rest, "POST", "model-versions/set-tag", at | {"key": _GATE, "value": decision})


def _exists(rest: httpx.Client, model: str, number: int) -> bool:
    try:
        call(rest, "GET", "model-versions/get", {"name": model, "version": str(number)})
    except NotFound:
        return False
    return True
