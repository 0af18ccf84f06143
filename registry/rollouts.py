"""Canaries in steps: a version gets more and more of the traffic, and is promoted or taken back by what it shows.

The rows here say what is being tried and how far it is; deploy/rollout.py decides, monitoring/canaries.py acts. Each
step is a change of the deployment like any other, in the ledger, by ``tunesmith for <who began it>``. Who changes the
deployment by hand meanwhile ends the canary: people have the last word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries
from infra.errors import Conflict, NotFound, UsageError
from registry import deployments
from registry.deployments import Change

SQL = load_queries(Path(__file__).with_suffix(".sql"))
End = Literal["promoted", "taken_back", "stopped"]
_COMPARES = 50  # requests of a step, from which on traffic has compared the two
WATCHED = (  # in words: deploy/rollout.py
    "errors", "abandoned", "late", "slow", "slowest", "long", "dear", "truncated", "empty", "disliked",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step is passed with `min_requests` of the challenger's after `min_minutes`; one that has too few after
    `max_hours` ends the canary, undecided. After the last one the version is promoted. The test takes a
    version that is no worse back with a probability of at most `alpha`, over all steps; its alerts may too. What is in
    `ignore`, of `WATCHED`, may be as much worse as it likes."""

    steps: tuple[float, ...] = (0.01, 0.05, 0.25, 0.5)  # and then all: at 100 % nobody is left to compare with
    min_requests: int = 100
    min_minutes: float = 10.0
    max_hours: float = 24.0
    alpha: float = 0.05
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.steps), self.steps, strict=False))
        if not self.steps or not rising or self.steps[-1] > 1:
            raise UsageError(
                "The steps of a canary rise from above 0 to at most 1 (100 %).", hint="Such as 5%,25%,100%."
            )
        if not (self.min_requests >= 1 and 0 <= self.min_minutes <= 60 * self.max_hours <= 60 * 24 * 365):
            raise UsageError(
                "A canary's step needs at least one request, and at least its minutes within its hours.",
                hint="Look at min_requests, min_minutes and max_hours.",
            )
        if unknown := [name for name in self.ignore if name not in WATCHED]:
            raise UsageError(f"A canary does not watch {unknown[0]!r}.", hint=f"It watches {', '.join(WATCHED)}.")
        if not 0 < self.alpha <= 0.5:
            raise UsageError("A canary's alpha lies between 0 and 0.5.", hint="Such as 0.05.")

    @property
    def compares(self) -> bool:
        """Whether it shows as much of a version beside the champion as a judgement beside it would."""
        return self.steps[0] <= deployments.TRIED and self.min_requests >= _COMPARES

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "steps": list(self.steps), "ignore": list(self.ignore)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Plan:
        """What is left out is as usual."""
        return cls(**{**body, **{name: tuple(body[name]) for name in ("steps", "ignore") if name in body}})


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A row. `findings` are what the last look showed, `said` what it decided."""

    id: int
    model: str
    version: int
    champion: int
    plan: dict[str, Any]
    actor: str
    reason: str
    state: Literal["running"] | End
    step: int
    begun_at: datetime
    step_at: datetime
    seen_at: datetime | None
    said: str
    findings: list[dict[str, Any]]
    ended_at: datetime | None

    @property
    def parsed(self) -> Plan:
        return Plan.from_json(self.plan)

    @property
    def share(self) -> float:
        """Of the traffic, at the step it is at."""
        return self.parsed.steps[self.step]

    def to_json(self) -> dict[str, Any]:
        body = {**asdict(self), "share": self.share}
        times = {name: at.astimezone(UTC) for name, at in body.items() if isinstance(at, datetime)}
        return {name: value for name, value in (body | times).items() if name != "id"}


def begin(
    conn: Connection, model: str, number: int, plan: Plan, *, actor: str, reason: str,
    expect_generation: int | None = None,
) -> Change:  # fmt: skip
    """Give a version the first step's share, to be stepped from there; what runs already as asked is left as it is.

    Raises Conflict where another canary in steps runs, and as `deployments.canary` does; Refused also for a version
    whose gate did not pass, since it could not be promoted in the end, or, where the plan itself does not compare
    (`Plan.compares`), that was judged beside another version than serves now.
    """
    deployments.check_passed(conn, model, number, compared=plan.compares)
    # Of two that begin at once the second sees the first; in the watcher's order, deployment before canary
    deployments.lock(conn, model)
    now, there = lock(conn, model), deployments.read(conn, model)
    if now is not None and (there.challenger, there.challenger_share) != (now.version, now.share):
        end(conn, now, "stopped")  # by hand, and the watcher has not come by since
        now = None
    if now is not None:
        if (now.version, now.plan) == (number, plan.to_json()):
            return Change(changed=False, deployment=deployments.read(conn, model))
        raise Conflict(
            f"A canary of {model}:{now.version} is at {100 * now.share:g} % already.",
            hint=f"Stop it first with `tunesmith canary {model} --stop`.",
        )
    change = deployments.canary(
        conn, model, number, share=plan.steps[0], actor=actor, reason=reason, expect_generation=expect_generation,
        compared=True,
    )  # fmt: skip
    conn.execute(
        SQL["begin"],
        {
            "model": model,
            "version": number,
            "champion": change.deployment.champion,
            "plan": Jsonb(plan.to_json()),
            "actor": actor,
            "reason": reason,
        },
    )
    return change


def running(conn: Connection, model: str) -> Rollout | None:
    row = conn.execute(SQL["running"], {"model": model}).fetchone()
    return Rollout(**row) if row else None


def models(conn: Connection) -> list[str]:
    """Those with one that runs."""
    return [str(row["model"]) for row in conn.execute(SQL["all_running"])]


def newest(conn: Connection, model: str) -> Rollout:
    """The one that runs, or the last one that did. Raises NotFound."""
    deployments.read(conn, model)
    row = conn.execute(SQL["newest"], {"model": model}).fetchone()
    if row is None:
        raise NotFound(
            f"{model} has had no canary in steps.", hint=f"Begin one: tunesmith rollout {model}:N --reason TEXT"
        )
    return Rollout(**row)


def lock(conn: Connection, model: str) -> Rollout | None:
    """The one that runs, for this transaction alone."""
    row = conn.execute(SQL["lock"], {"model": model}).fetchone()
    return Rollout(**row) if row else None


def note(conn: Connection, rollout: Rollout, said: str, findings: Sequence[Mapping[str, Any]]) -> None:
    """What a look at it showed."""
    conn.execute(SQL["note"], {"id": rollout.id, "said": said, "findings": Jsonb(list(findings))})


def advance(conn: Connection, rollout: Rollout, reason: str) -> None:
    """To the next step. Raises as `deployments.canary` does."""
    share = rollout.parsed.steps[rollout.step + 1]
    deployments.canary(
        conn, rollout.model, rollout.version, share=share, actor=_actor(rollout), reason=reason, compared=True
    )
    conn.execute(SQL["advance"], {"id": rollout.id})


def promote(conn: Connection, rollout: Rollout, reason: str) -> None:
    """The version serves. Raises Refused where approvals are missing, and as `deployments.promote` does."""
    deployments.promote(conn, rollout.model, rollout.version, actor=_actor(rollout), reason=reason, compared=True)
    end(conn, rollout, "promoted")


def take_back(conn: Connection, rollout: Rollout, reason: str, state: End) -> None:
    """The champion has all of the traffic again."""
    deployments.stop(conn, rollout.model, "challenger", actor=_actor(rollout), reason=reason)
    end(conn, rollout, state)


def end(conn: Connection, rollout: Rollout, state: End) -> None:
    conn.execute(SQL["end"], {"id": rollout.id, "state": state})


def _actor(rollout: Rollout) -> str:
    return f"tunesmith for {rollout.actor}"
