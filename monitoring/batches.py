"""The request events of batches, as recorders stored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, LiteralString

from infra.db import Connection


def events(conn: Connection, query: LiteralString, batches: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What a `query` that takes `batches`, `since` and `until` finds of batches (id, first_at, last_at)."""
    since, until = min(batch["first_at"] for batch in batches), max(batch["last_at"] for batch in batches)
    asked = {"batches": [batch["id"] for batch in batches], "since": since, "until": until}
    return conn.execute(query, asked).fetchall()
