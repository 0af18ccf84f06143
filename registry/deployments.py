"""What serves: compare-and-set changes of a model's slots, each one entry of a hash-chained ledger.

Every change happens in the caller's one transaction: lock the deployment row, compare the generation, write row,
ledger entry and outbox together. So it is there entirely or not at all, and repeating a command is safe.
"""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from infra import storage
from infra.db import Connection, load_queries, one
from infra.errors import Conflict, NotFound, Refused, UsageError
from registry import approvals, signatures
from registry.bundle import canonical_json
from registry.evidence import keep_evidence
from registry.names import check_model_name

SQL = load_queries(Path(__file__).with_suffix(".sql"))

Slot = Literal["champion", "challenger", "shadow"]
Action = Literal["promote", "rollback", "canary", "shadow", "stop"]
FIRST_HASH = "sha256:" + "0" * 64  # what the first entry of a model is chained to
_BESIDE_CHAMPION = ("golden_kept", "suite compatibility")  # gates that stand on its answers without saying so
TRIED = 0.5  # the share of the traffic that a version may have whose gate has not decided


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Which versions hold a model's slots. `generation` is the number of changes so far."""

    model: str
    generation: int = 0
    champion: int | None = None
    challenger: int | None = None
    challenger_share: float = 0.0
    shadow: int | None = None

    def slot_of(self, number: int) -> Slot | None:
        """The slot a version holds; it never holds two."""
        holders: dict[int | None, Slot] = {
            self.shadow: "shadow",
            self.challenger: "challenger",
            self.champion: "champion",
        }
        return holders.get(number)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One change. `evidence` is the digest of the gate decision it rests on, with the approvals where there are any;
    `forced`: a gate, or the want of approvals, was overridden.

    `hash` = SHA-256 over the canonical JSON of all other fields, the previous entry's hash among them.
    """

    model: str
    generation: int
    at: datetime
    actor: str
    action: Action
    slot: Slot
    from_version: int | None
    to_version: int | None
    share: float | None
    reason: str
    forced: bool
    evidence: str | None
    previous_hash: str
    hash: str = ""

    def sealed(self) -> str:
        """The hash this entry must have."""
        body = {**asdict(self), "at": self.at.astimezone(UTC).isoformat(timespec="microseconds")}
        del body["hash"]
        return storage.text_digest(canonical_json(body))

    def to_json(self) -> dict[str, Any]:
        """The contract's ledger entry."""
        body = asdict(self)
        body["from"], body["to"] = body.pop("from_version"), body.pop("to_version")
        return {**body, "at": self.at.astimezone(UTC)}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a command did. `changed` is false, and `entry` None, when all was already as asked."""

    changed: bool
    deployment: Deployment
    entry: Entry | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "changed": self.changed,
            **self.deployment.to_json(),
            "entry": self.entry.to_json() if self.entry else None,
        }


def actor_here() -> str:
    """Who acts on the command line: ``os:user@host``."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name  # not what the environment says, which is anybody's to set
    except KeyError:  # a user id without a name, as in some containers
        user = str(os.getuid())
    return f"os:{user}@{socket.gethostname()}"


def read(conn: Connection, model: str) -> Deployment:
    """The slots of a model, all empty at generation 0 before the first change. Raises NotFound."""
    check_model_name(model)
    row = conn.execute(SQL["read"], {"model": model}).fetchone()
    if row is None:
        raise NotFound(f"There is no model {model}.", hint="See `tunesmith models`.")
    return Deployment(**row)


def promote(
    conn: Connection,
    model: str,
    number: int,
    *,
    actor: str,
    reason: str,
    expect_generation: int | None = None,
    force: bool = False,
    compared: bool = False,
) -> Change:
    """Make a version the champion; it leaves the challenger or shadow slot if it held one.

    Raises NotFound for no such version; Conflict, naming the current generation, when that is not
    `expect_generation` (None: the one read before waiting for the row) any more; Refused when the version's gate
    decision is not a pass, or was made beside another champion than serves now (unless traffic has `compared` the
    two), or approvals are missing, unless `force`, which the ledger shows for ever; Refused, whatever
    is forced, when signatures are demanded and no trusted key signed it. Promoting what serves changes nothing.
    """
    check_reason(reason, required=True)
    _demand_signature(conn, model, number)
    now = _lock(conn, model, expect_generation, done=lambda d: d.champion == number)
    version = _version(conn, model, number)
    if now.champion == number:
        return Change(changed=False, deployment=now)
    forced = _gate_allows(model, number, version["gate_body"], force=force, passed_only=True)
    forced |= not compared and _stale(conn, now, number, version["gate_body"], force=force)
    agreed = approvals.of(conn, model, number)
    if agreed.missing and not force:
        raise Refused(
            f"{model}:{number} is not promoted: {agreed.outstanding()}.",
            hint="A person may override it with --force and a reason, on the record.",
            details={"approvals": agreed.to_json()},
        )
    return _change(
        conn,
        now,
        apply(now, action="promote", slot="champion", to=number, share=None),
        actor=actor,
        action="promote",
        slot="champion",
        reason=reason,
        forced=forced or agreed.missing > 0,
        evidence=_with_approvals(conn, version, agreed),
    )


def rollback(
    conn: Connection,
    model: str,
    *,
    actor: str,
    reason: str,
    to: int | None = None,
    expect_generation: int | None = None,
) -> Change:
    """Take the last promotion that still stands back: the champion is again the one from before it.

    Promotions stack up and rollbacks take them off: after promote 1, 2, 3 a first rollback gives 2, a second 1, and a
    third is Refused, since nothing served before 1. With `to`, all promotions down to that version's latest are taken
    back; a version that never served is Refused, since that would be a promotion around its gate.
    Raises Conflict as `promote` does, and NotFound.
    """
    check_reason(reason, required=True)
    now = _lock(conn, model, expect_generation, done=lambda d: to is not None and d.champion == to)
    if to is not None:
        _version(conn, model, to)
        if now.champion == to:
            return Change(changed=False, deployment=now)
    rows = conn.execute(SQL["champions"], {"model": model}).fetchall()
    if to is None:
        stood = standing((row["action"], row["to_version"]) for row in rows)
        if len(stood) < 2:
            raise Refused(
                f"Nothing served {model} before "
                + (f"version {now.champion}." if now.champion else "now: no version was ever promoted."),
                hint="Promote another version.",
            )
        to = stood[-2]
    elif all(row["to_version"] != to for row in rows):
        raise Refused(f"{model}:{to} has never served.", hint=f"Use `tunesmith promote {model}:{to}`.")
    return _change(
        conn,
        now,
        apply(now, action="rollback", slot="champion", to=to, share=None),
        actor=actor,
        action="rollback",
        slot="champion",
        reason=reason,
        evidence=_version(conn, model, to)["gate"],
    )


def check_passed(conn: Connection, model: str, number: int, *, compared: bool) -> None:
    """Raises Refused for a version whose gate did not pass, or, unless traffic has `compared` the two, passed beside
    another version than serves now; NotFound for none."""
    gate = _version(conn, model, number)["gate_body"]
    _gate_allows(model, number, gate, force=False, passed_only=True)
    if not compared:
        _stale(conn, read(conn, model), number, gate, force=False)


def canary(
    conn: Connection,
    model: str,
    number: int,
    *,
    share: float,
    actor: str,
    reason: str = "",
    expect_generation: int | None = None,
    force: bool = False,
    compared: bool = False,
) -> Change:
    """Give a version that share (0 < share <= 1) of the model's traffic, as its challenger.

    Raises Refused when nothing serves yet, when the version is the champion, or, unless `force`, when its gate failed
    or it is to have more than `TRIED` and could not be promoted: up to there an undecided one may be tried on traffic.
    Conflict and NotFound as `promote` does; UsageError for the share, and for no reason where something is forced.
    """
    if not 0 < share <= 1:
        raise UsageError(f"A share lies above 0 and is at most 1 (100 %), not {share:g}.")
    _demand_signature(conn, model, number)
    same = {"challenger": number, "challenger_share": share}
    now = _lock(conn, model, expect_generation, done=lambda d: _has(d, same))
    version = _version(conn, model, number)
    if _has(now, same):
        return Change(changed=False, deployment=now)
    _beside_champion(now, number, "a share of its traffic")
    forced = _gate_allows(model, number, version["gate_body"], force=force, passed_only=share > TRIED, share=share)
    forced |= share > TRIED and not compared and _stale(conn, now, number, version["gate_body"], force=force)
    evidence = version["gate"]
    if share > TRIED:
        agreed = approvals.of(conn, model, number)
        if agreed.missing and not force:
            raise Refused(f"{model}:{number} gets no more than {TRIED:.0%} of the traffic: {agreed.outstanding()}.")
        forced = forced or agreed.missing > 0
        evidence = _with_approvals(conn, version, agreed)
    return _change(
        conn,
        now,
        apply(now, action="canary", slot="challenger", to=number, share=share),
        actor=actor,
        action="canary",
        slot="challenger",
        reason=reason,
        share=share,
        forced=forced,
        evidence=evidence,
    )


def shadow(
    conn: Connection,
    model: str,
    number: int,
    *,
    actor: str,
    reason: str = "",
    expect_generation: int | None = None,
) -> Change:
    """Send a version copies of the model's traffic; it answers nobody, so no gate is asked.

    Raises Refused when nothing serves yet or the version is the champion or the challenger; Conflict and NotFound.
    """
    _demand_signature(conn, model, number)
    now = _lock(conn, model, expect_generation, done=lambda d: d.shadow == number)
    version = _version(conn, model, number)
    if now.shadow == number:
        return Change(changed=False, deployment=now)
    _beside_champion(now, number, "copies of its traffic")
    if now.challenger == number:
        raise Refused(
            f"{model}:{number} is the challenger and sees traffic already.",
            hint=f"Stop it first with `tunesmith canary {model} --stop`.",
        )
    return _change(
        conn,
        now,
        apply(now, action="shadow", slot="shadow", to=number, share=None),
        actor=actor,
        action="shadow",
        slot="shadow",
        reason=reason,
        evidence=version["gate"],
    )


def stop(
    conn: Connection,
    model: str,
    slot: Literal["challenger", "shadow"],
    *,
    actor: str,
    reason: str = "",
    expect_generation: int | None = None,
) -> Change:
    """Empty the challenger or shadow slot; an empty one stays, unchanged. Raises Conflict and NotFound."""
    now = _lock(conn, model, expect_generation, done=lambda d: getattr(d, slot) is None)
    if getattr(now, slot) is None:
        return Change(changed=False, deployment=now)
    return _change(
        conn,
        now,
        apply(now, action="stop", slot=slot, to=None, share=None),
        actor=actor,
        action="stop",
        slot=slot,
        reason=reason,
    )


def apply(now: Deployment, *, action: Action, slot: Slot, to: int | None, share: float | None) -> Deployment:
    """The deployment after one more entry: the one place that says what an action does to the slots."""
    after = replace(now, generation=now.generation + 1)
    if slot != "challenger" and to is not None and now.challenger == to:
        after = replace(after, challenger=None, challenger_share=0.0)
    if slot != "shadow" and to is not None and now.shadow == to:
        after = replace(after, shadow=None)
    if slot == "champion":
        return replace(after, champion=to)
    if slot == "challenger":
        return replace(after, challenger=to, challenger_share=share or 0.0)
    return replace(after, shadow=to)


def replay(model: str, entries: Iterable[Entry]) -> Deployment:
    """The deployment that a ledger, oldest entry first, leads to."""
    state = Deployment(model=model)
    for entry in entries:
        state = apply(state, action=entry.action, slot=entry.slot, to=entry.to_version, share=entry.share)
    return state


def standing(champions: Iterable[tuple[Action, int | None]]) -> list[int]:
    """The promotions that still stand, oldest first, from the champion slot's (action, to) in order."""
    stack: list[int] = []
    for action, number in champions:
        if number is None:
            continue
        if action == "rollback" and number in stack:
            while stack[-1] != number:
                stack.pop()
        else:  # a promotion, or a rollback to a version whose own promotion was taken back before
            stack.append(number)
    return stack


def history(conn: Connection, model: str, at: datetime | None = None) -> list[Entry]:
    """The ledger of a model, oldest first, up to a time if one is given; `replay` it to know what served then.

    Raises NotFound for no such model.
    """
    read(conn, model)
    return [Entry(**row) for row in conn.execute(SQL["history"], {"model": model, "at": at})]


def verify_chain(conn: Connection, model: str) -> list[str]:
    """What is wrong with a model's ledger, a sentence each; an empty list when it is whole.

    Generations run from 1 without a gap, each hash is its entry's and chained to the one before, what the entries rest
    on has the digests they name, and the deployment row is what they lead to.
    """
    conn.execute(SQL["share"], {"model": model})  # nobody promotes between the row and its ledger
    now, entries = read(conn, model), history(conn, model)
    problems = []
    previous = FIRST_HASH
    for expected, entry in enumerate(entries, start=1):
        if entry.generation != expected:
            problems.append(f"Entry {expected} of the ledger of {model} has generation {entry.generation}.")
        if entry.previous_hash != previous:
            problems.append(f"Generation {entry.generation} of {model} is not chained to the entry before it.")
        if entry.hash != entry.sealed():
            problems.append(f"Generation {entry.generation} of {model} was changed after it was written.")
        previous = entry.hash
    for row in conn.execute(SQL["evidence"], {"model": model}):
        if row["body"] is None:
            problems.append(f"The evidence that generation {row['generation']} of {model} rests on is gone.")
        elif storage.text_digest(canonical_json(row["body"])) != row["digest"]:
            problems.append(f"The evidence that generation {row['generation']} of {model} rests on was changed.")
    if (led_to := replay(model, entries)) != now:
        problems.append(f"The deployment of {model} is {now.to_json()}, but its ledger leads to {led_to.to_json()}.")
    return problems


def lock(conn: Connection, model: str) -> None:
    """Keep every other change of a model's deployment waiting until the transaction ends. Raises NotFound."""
    if read(conn, model).generation == 0:
        conn.execute(SQL["create"], {"model": model})
    conn.execute(SQL["lock"], {"model": model})


def _lock(conn: Connection, model: str, expected: int | None, *, done: Any) -> Deployment:
    """The locked row. An explicit generation is compared first; the implicit one only if there is still work."""
    now = read(conn, model)
    seen = now.generation
    if expected is None or seen <= expected:  # else it was too late already: nobody waits to be told so
        if seen == 0:
            conn.execute(SQL["create"], {"model": model})
        now = Deployment(**one(conn, SQL["lock"], {"model": model}))
    if now.generation == (seen if expected is None else expected) or (expected is None and done(now)):
        return now
    raise Conflict(
        f"{model} is at generation {now.generation}, not {seen if expected is None else expected}: "
        f"someone changed it first (version {now.champion} serves).",
        hint="Look at `tunesmith history`, then decide again.",
        details={"generation": now.generation},
    )


def _version(conn: Connection, model: str, number: int) -> dict[str, Any]:
    row = conn.execute(SQL["version"], {"model": model, "number": number}).fetchone()
    if row is None:
        raise NotFound(f"There is no version {model}:{number}.", hint=f"See `tunesmith versions {model}`.")
    return row


def _demand_signature(conn: Connection, model: str, number: int) -> None:
    """Before the row is locked, since it reads all of the version's files. A rollback never asks: what is brought back
    has served."""
    if signatures.demanded():
        signatures.demand(f"{model}:{number}", storage.get("bundle", _version(conn, model, number)["bundle_digest"]))


def _with_approvals(conn: Connection, version: dict[str, Any], agreed: approvals.Approvals) -> str | None:
    """The digest of what a promotion rests on: the gate decision, and who approved."""
    if not (agreed.needed or agreed.given):
        return str(version["gate"]) if version["gate"] else None
    body = {**(version["gate_body"] or {}), "gate": version["gate"], "approved": agreed.to_json()}
    times = [{**given, "at": given["at"].isoformat()} for given in body["approved"]["given"]]
    return keep_evidence(conn, "promotion", {**body, "approved": body["approved"] | {"given": times}})


def _has(deployment: Deployment, values: dict[str, Any]) -> bool:
    return all(getattr(deployment, name) == value for name, value in values.items())


def _beside_champion(now: Deployment, number: int, what: str) -> None:
    if now.champion is None:
        raise Refused(
            f"No version of {now.model} serves, so there is nothing to give {now.model}:{number} {what}.",
            hint="Promote a version first.",
        )
    if now.champion == number:
        raise Refused(f"{now.model}:{number} is the champion.", hint="Name another version.")


def _gate_allows(
    model: str, number: int, gate: Any, *, force: bool, passed_only: bool, share: float | None = None
) -> bool:
    """Whether the gate had to be overridden. Raises Refused when it says no and nobody forces it."""
    decision = gate["decision"] if gate else "none"
    if decision == "pass" or (not passed_only and decision != "fail"):
        return False
    if force:
        return True
    reasons = [str(reason) for reason in gate.get("reasons", [])] if gate else []
    said = "it was never judged by a gate" if gate is None else f"its gate decision is {decision}"
    what = f"gets no more than {TRIED:.0%} of the traffic" if decision != "fail" else "gets no traffic"
    if share is None:
        what = "is not promoted"
    raise Refused(
        f"{model}:{number} {what}: {said}.",
        hint="; ".join([*reasons, "a person may override it with --force and a reason, on the record"]) + ".",
        details={"decision": decision, "reasons": reasons},
    )


def _stale(conn: Connection, now: Deployment, number: int, gate: Any, *, force: bool) -> bool:
    """Whether it had to be overridden that the gates compared with another champion than serves now, by its files: a
    version that was judged in another registry was judged beside another number. Raises Refused when nobody forces
    it."""
    against = [
        entry
        for entry in (gate or {}).get("gates", ())
        if entry.get("against") == "champion" or entry.get("metric") in _BESIDE_CHAMPION
    ]
    if not against or "champion_bundle" not in gate or now.champion is None:
        return False
    if gate["champion_bundle"] == _version(conn, now.model, now.champion)["bundle_digest"]:
        return False
    if force:
        return True
    beside = "another version" if gate["champion_bundle"] else "no other version"
    raise Refused(
        f"{now.model}:{number} was judged beside {beside}, and version {now.champion} serves now.",
        hint=f"Judge it beside that one: `tunesmith evaluate {now.model}:{number} --attach REASON`; or a person may "
        "override it with --force and a reason, on the record.",
        details={"beside": gate["champion"], "champion": now.champion},
    )


def _change(
    conn: Connection,
    now: Deployment,
    after: Deployment,
    *,
    actor: str,
    action: Action,
    slot: Slot,
    reason: str,
    share: float | None = None,
    forced: bool = False,
    evidence: str | None = None,
) -> Change:
    follows = one(conn, SQL["next_entry"], {"model": now.model})
    if follows["generation"] != now.generation:
        raise Refused(
            f"The deployment of {now.model} is at generation {now.generation}, and its ledger at "
            f"{follows['generation']}: somebody changed one of them by hand.",
            hint="`tunesmith verify` says more. Nothing was changed.",
        )
    entry = Entry(
        model=now.model,
        generation=after.generation,
        at=follows["at"],
        actor=actor,
        action=action,
        slot=slot,
        from_version=getattr(now, slot),
        to_version=getattr(after, slot),
        share=share,
        reason=check_reason(reason, required=forced or action in ("promote", "rollback")),
        forced=forced,
        evidence=evidence,
        previous_hash=follows["hash"] or FIRST_HASH,
    )
    entry = replace(entry, hash=entry.sealed())
    with conn.pipeline():  # one way to the database and back for all four
        conn.execute(SQL["update"], {**asdict(after), "at": entry.at})
        conn.execute(SQL["append"], asdict(entry))
        conn.execute(SQL["enqueue"], {"model": now.model})
        conn.execute(SQL["notify"], {"model": now.model, "generation": after.generation})
    return Change(changed=True, deployment=after, entry=entry)


def check_reason(reason: str, *, required: bool) -> str:
    """The reason, stripped. Raises UsageError for an empty one where it is required, and for what is no text."""
    text = reason.strip()
    if required and not text:
        raise UsageError("This needs a reason, which stays on the record.", hint="Say why with --reason.")
    if len(text) > 2000 or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError("A reason is at most 2000 characters of text.")
    return text
