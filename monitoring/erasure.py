"""One person's data, erased: the text of the requests that named them as `user`, and what was said about the answers.

What remains says nothing of a person: counts in windows, and events without text and without whose they were. Rows that
corrections of theirs became are in data sets, which are never changed, and in the versions that learned from them:
those are named, so that a person can decide to train again and delete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.db import Connection, load_queries, one
from infra.errors import UsageError
from infra.storage import text_digest
from registry import datasets, lineage
from registry.deployments import check_reason

SQL = load_queries(Path(__file__).with_suffix(".sql"))


def erase(conn: Connection, user: str, *, actor: str, reason: str) -> dict[str, Any]:
    """Erase what is kept of a `user`, as their requests wrote it; what is on its way to the database is stored without
    text when it comes: ``{"at", "events", "feedback", "rows", "datasets", "versions"}``, the last three as
    `lineage.of_row` names them. Doing it again erases what came since. Raises UsageError."""
    if not user.strip() or "\0" in user:
        raise UsageError("There is no user to erase.", hint="Name them as their requests did, in `user`.")
    text = check_reason(reason, required=True)
    subject = {"subject": text_digest(user)}
    rows = [
        datasets.make_row([*found["messages"], {"role": "assistant", "content": found["correction"]}]).id
        for found in conn.execute(SQL["corrections"], subject)
    ]
    seen = lineage.of_row(conn, sorted(set(rows))) if rows else {"rows": [], "datasets": [], "versions": []}
    conn.execute(SQL["lock"])  # last, since no gateway stores anything meanwhile
    at = one(conn, SQL["note"], subject | {"actor": actor, "reason": text})["at"]
    conn.execute(SQL["theirs"], subject)
    feedback = conn.execute(SQL["strip_feedback"]).rowcount
    events = conn.execute(SQL["strip_events"]).rowcount
    return {"at": at, "events": events, "feedback": feedback, **seen}
