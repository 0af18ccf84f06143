"""What decisions rest on: JSON under its own digest, kept for ever."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from infra import storage
from infra.db import Connection, load_queries
from infra.errors import NotFound
from registry.bundle import canonical_json

SQL = load_queries(Path(__file__).with_suffix(".sql"))


def evidence(conn: Connection, digest: str | None) -> dict[str, Any] | None:
    """The kept evaluation, gate decision or promotion of a digest; None for None. Raises NotFound."""
    if digest is None:
        return None
    row = conn.execute(SQL["read"], {"digest": digest}).fetchone()
    if row is None:
        raise NotFound(f"There is no evidence {digest}.")
    return dict(row["body"])


def keep_evidence(conn: Connection, kind: str, body: Mapping[str, Any]) -> str:
    """Keep evidence for ever and return its digest, which is that of its canonical JSON."""
    import orjson

    text = canonical_json(dict(body))
    digest = storage.text_digest(text)
    conn.execute(SQL["keep"], {"digest": digest, "kind": kind, "body": Jsonb(orjson.loads(text))})
    return digest
