"""Data sets: what versions learned from, where it came from, and who learned from it."""

from __future__ import annotations

from starlette.responses import Response

from infra.db import transaction
from monitoring.console.render import SQL, Visit, draw


def listing(visit: Visit) -> Response:
    """Newest first."""
    with transaction() as conn:
        rows = conn.execute(SQL["datasets"]).fetchall()
    return draw(visit, "data.html", rows=rows)
