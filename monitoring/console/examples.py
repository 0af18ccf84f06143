"""Requests that show what an alert or a drift is about: what was asked, or what it is like where that is not kept."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from deploy.recorder import event_time
from infra.db import Connection
from infra.errors import NotFound
from monitoring import neighbours
from monitoring.console.render import SQL, Visit
from registry.profile import Profile


def read(
    conn: Connection, visit: Visit, model: str, version: int, requests: Sequence[str]
) -> list[dict[str, str | None]]:
    """Each request's id, its text where it is kept, and else, for who may see data, the training row nearest to it."""
    ids = [UUID(request) for request in requests]
    known = {"ids": ids, "ats": [event_time(i) for i in ids], "model": model, "version": version}
    found = {row["id"]: row for row in conn.execute(SQL["examples"], known)}
    made = conn.execute(SQL["profile"], {"model": model, "number": version}).fetchone()
    profile = Profile.from_json(made["profile"] if made else {})
    examples = []
    for identifier in ids:
        if (row := found.get(identifier)) is not None:
            near = None
            if row["asked"] is None and row["dataset"] and row["features"] and visit.allows("operator"):
                near = _nearest(row["dataset"], row["features"], profile)
            examples.append({"id": str(identifier), "text": row["asked"], "nearest": near})
    return examples


def _nearest(dataset: str, features: Sequence[float], profile: Profile) -> str | None:
    try:
        row = neighbours.nearest(dataset, features, profile)
    except NotFound:
        return None
    return row.prompt[-1]["content"] if row is not None else None
