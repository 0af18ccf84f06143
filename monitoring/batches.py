"""The request events of batches, as recorders stored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, LiteralString

from infra.db import Connection

# A batch's events lie near its own time; where they do not (late, foreign clocks), wider bounds follow.
_AROUND = (timedelta(minutes=2), timedelta(days=1), timedelta(days=20_000))


def events(conn: Connection, query: LiteralString, batches: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What a `query` that takes `batches`, `since` and `until` finds of batches (id, rows, created_at): as many events
    as their `rows` say, unless retention took some."""
    ids, rows = [batch["id"] for batch in batches], sum(batch["rows"] for batch in batches)
    first, last = (end(batch["created_at"] for batch in batches) for end in (min, max))
    found: list[Any] = []
    for around in _AROUND:
        found = conn.execute(query, {"batches": ids, "since": first - around, "until": last + around}).fetchall()
        if len(found) >= rows:
            break
    return found
