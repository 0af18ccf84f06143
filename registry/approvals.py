"""Approvals: people with the operator role, not the author, who agree that a version may serve.

How many a version needs, and who its author is, stand in its gate decision, so they are sealed with what was judged.
A person is ``os:user@host``, or whoever a key was made for; a key that was made for nobody is no person's word.
Approving twice counts once, and nothing given is ever taken away; what was given before a version was judged again is
of other evidence, and counts no more. A user is one person on all machines, and so is whoever has a key made for
that user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from infra.db import Connection, load_queries
from infra.errors import Conflict, NotFound, Refused, UsageError
from registry.names import check_model_name

SQL = load_queries(Path(__file__).with_suffix(".sql"))
Role = Literal["operator", "admin"]


@dataclass(frozen=True, kw_only=True)
class Approval:
    """One person's word. `person` without a key's name, `actor` with it; `bundle_digest` is what was approved."""

    person: str
    actor: str
    role: Role
    reason: str
    bundle_digest: str
    at: datetime

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "at": self.at.astimezone(UTC)}


@dataclass(frozen=True, kw_only=True)
class Approvals:
    """Of one version: how many are `needed`, by whom not (`author`, None where nobody is known), what was `given`."""

    model: str
    number: int
    needed: int
    author: str | None
    given: tuple[Approval, ...]

    @property
    def missing(self) -> int:
        return max(0, self.needed - len(self.given))

    def to_json(self) -> dict[str, Any]:
        return {
            "needed": self.needed,
            "missing": self.missing,
            "author": self.author,
            "given": [approval.to_json() for approval in self.given],
            "outstanding": self.outstanding() if self.missing else None,
        }

    def outstanding(self) -> str:
        """Who must do what, as the rest of a sentence about the version; only where some are missing."""
        people = "1 more person" if self.missing == 1 else f"{self.missing} more people"
        has = f"has {len(self.given)} ({', '.join(a.actor for a in self.given)})" if self.given else "has none"
        other = f", other than its author {self.author}," if self.author else ""
        return (
            f"it needs {self.needed} approval{'s' * (self.needed > 1)} and {has}: {people} with the operator role"
            f"{other} must say `tunesmith approve {self.model}:{self.number} --reason TEXT`"
        )


def person(conn: Connection, actor: str) -> str:
    """Who an actor is, whatever stands behind in brackets: ``os:user@host``, ``key:<id>``, or ``person:<user>`` where
    the key was made for somebody."""
    who = actor.partition(" (")[0]
    if not who.startswith("key:"):
        return who
    row = conn.execute(SQL["whose_key"], {"id": who.removeprefix("key:")}).fetchone()
    return f"person:{row['person']}" if row and row["person"] else who


def same(one: str, other: str) -> bool:
    """Whether two people are one: ``person:<user>`` is that user on all machines, and so is ``os:<user>@host``."""
    return _user(one) == _user(other)


def _user(who: str) -> str:
    if who.startswith("os:"):
        return who.removeprefix("os:").rpartition("@")[0].casefold()
    return who.removeprefix("person:").casefold()


def of(conn: Connection, model: str, number: int) -> Approvals:
    """A version's approvals. Raises NotFound for no such version."""
    return _of(conn, model, number, _version(conn, model, number)["gate"])


def approve(
    conn: Connection, model: str, number: int, *, actor: str, role: str, reason: str, gate: str | None = None
) -> tuple[bool, Approvals]:
    """Note that a person approves of a version; whether that is new, and how it stands now. `gate` is the digest of the
    gate decision that the person has read, where that is known.

    Raises NotFound for no such version, Refused for its author, for a role that may not and for a key of no person,
    UsageError for the reason, Conflict when the version was judged again since it was read.
    """
    text = reason.strip()
    if not text or len(text) > 2000 or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(
            "An approval needs a reason of at most 2000 characters of text.", hint="Say why with --reason."
        )
    conn.execute(SQL["lock"], {"model": model})  # of two words of one person at once the second sees the first
    version = _version(conn, model, number)
    who = person(conn, actor)
    if gate is not None and gate != version["gate_digest"]:
        raise Conflict(
            f"{model}:{number} was judged again since you read its evaluation.", hint="Read the new one, then approve."
        )
    if role not in ("operator", "admin"):
        raise Refused(f"The role {role} may not approve.", hint="Ask an operator or an admin.")
    if who.startswith("key:"):
        raise Refused(
            f"{actor} was made for nobody, and people approve.",
            hint=f"Use a key of yours: `tunesmith keys create --role {role} --person USER --name NAME`.",
        )
    if same(who, person(conn, str((version["gate"] or {}).get("author")))):
        raise Refused(f"{actor} is the author of {model}:{number} and cannot approve it.", hint="Ask another person.")
    if version["imported_by"] and same(who, person(conn, version["imported_by"])):
        raise Refused(f"{actor} brought {model}:{number} here and cannot approve it.", hint="Ask another person.")
    values = {"model": model, "number": number, "person": who, "actor": actor, "role": role, "reason": text}
    if any(same(who, given.person) for given in _of(conn, model, number, version["gate"]).given):
        return False, _of(conn, model, number, version["gate"])
    new = conn.execute(SQL["give"], values | {"bundle_digest": version["bundle_digest"]}).fetchone() is not None
    return new, _of(conn, model, number, version["gate"])


def _of(conn: Connection, model: str, number: int, gate: Mapping[str, Any] | None) -> Approvals:
    given: dict[str, Approval] = {}
    for row in conn.execute(SQL["given"], {"model": model, "number": number}):
        given.setdefault(_user(row["person"]), Approval(**row))
    return Approvals(
        model=model,
        number=number,
        needed=int((gate or {}).get("approvals", 0)),
        author=(gate or {}).get("author"),
        given=tuple(given.values()),
    )


def _version(conn: Connection, model: str, number: int) -> dict[str, Any]:
    check_model_name(model)
    row = conn.execute(SQL["version"], {"model": model, "number": number}).fetchone()
    if row is None:
        raise NotFound(f"There is no version {model}:{number}.", hint=f"See `tunesmith versions {model}`.")
    return row
