"""What trials are compared by, the Pareto set, and the rule that picks one of it.

Every measure is one that a trial knows of itself, and less of it is better. Trials are drawn and stopped early by loss
alone; objectives, constraints and the rule choose among what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.errors import TunesmithError
from registry import halving
from registry.studies import Job

MEASURES: Mapping[str, str] = {
    "loss": "validation loss, nats a completion token",
    "adapter_parameters": "numbers in the saved adapter: what an engine holds and works through for each request",
    "latency_ms": "milliseconds of a token of an answer that our own engine decodes alone; measured after each rung, "
    "and only where a study weighs it. Not the same twice: a few per cent say nothing",
    "training_seconds": "worker seconds of all its rungs, validation included; not the same twice",
    "training_tokens": "tokens it was trained on in all its rungs",
    "step_ms_per_token": "training_seconds over training_tokens, in milliseconds: what more training would cost",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Of the trials whose first objective is at most `within` (a share: 0.02 is 2 %) above the best one's, the one
    with the least of the measure `then`."""

    within: float
    then: str


def measures(
    *,
    loss: float,
    adapter_parameters: int,
    training_seconds: float,
    training_tokens: int,
    latency_ms: float | None = None,
) -> dict[str, float]:
    """A row of all MEASURES, of a trial as it stands after a rung; seconds and tokens are sums up to there."""
    return {
        "loss": loss,
        "adapter_parameters": adapter_parameters,
        "latency_ms": math.inf if latency_ms is None else latency_ms,
        "training_seconds": training_seconds,
        "training_tokens": training_tokens,
        "step_ms_per_token": 1000 * training_seconds / training_tokens if training_tokens else math.inf,
    }


def pareto(rows: Sequence[Mapping[str, float]], objectives: Sequence[str]) -> list[int]:
    """The rows that no other one dominates, as ascending numbers. A row dominates another when it is worse in no
    objective and better in at least one (Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm:
    NSGA-II"), so equal rows are in it together or not at all. Rows that have no finite value for an objective are
    never in it."""
    points = [tuple(row.get(name, math.nan) for name in objectives) for row in rows]
    whole = [number for number, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    # In this order a point is dominated by none that comes after it
    for number in sorted(whole, key=points.__getitem__):
        if not any(_dominates(points[other], points[number]) for other in front):
            front.append(number)
    return sorted(front)


def pick(
    rows: Sequence[Mapping[str, float]],
    objectives: Sequence[str],
    rule: Rule | None = None,
    constraints: Mapping[str, float] | None = None,
) -> int:
    """The number of the row that wins: of the Pareto set of the rows that keep the constraints (the most of a measure
    that is allowed), by the rule; without one, by the first objective. What is left equal is decided by the objectives
    in their order, then by the rows' order.

    Raises TunesmithError when no row keeps the constraints, naming those that stand in the way.
    """
    limits = constraints or {}
    allowed = [n for n, row in enumerate(rows) if _keeps(row, limits)]
    front = [allowed[n] for n in pareto([rows[n] for n in allowed], objectives)]
    if not front:
        raise TunesmithError(_why_none(rows, limits), hint="Raise the limit, or make tuning.space smaller.")
    first = objectives[0]
    best = min(rows[n][first] for n in front)
    if rule is not None:
        front = [n for n in front if rows[n][first] <= best + rule.within * abs(best)]
    by = [rule.then, *objectives] if rule is not None else objectives
    return min(front, key=lambda n: tuple(rows[n][name] for name in by))


def measured(jobs: Sequence[Job]) -> list[tuple[Job, dict[str, float]]]:
    """Each measured rung with its measures, lower rungs first, since more steps may have overfitted."""
    rows = []
    for job in sorted((j for j in jobs if j.value is not None), key=lambda j: (j.rung, j.trial)):
        so_far = [j for j in jobs if j.trial == job.trial and j.rung <= job.rung]
        row = measures(
            loss=halving.loss(job),
            adapter_parameters=job.adapter_parameters or 0,
            training_seconds=sum(j.seconds or 0.0 for j in so_far),
            training_tokens=sum(j.tokens or 0 for j in so_far),
            latency_ms=job.latency_ms,
        )
        rows.append((job, row))
    return rows


def front(
    rows: Sequence[tuple[Job, dict[str, float]]], objectives: Sequence[str], constraints: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The Pareto set of the rows that keep the constraints, where there is more than one objective."""
    if len(objectives) == 1:
        return []
    rows = [(j, row) for j, row in rows if _keeps(row, constraints)]
    best = [rows[n] for n in pareto([row for _, row in rows], objectives)]
    return [{"trial": j.trial, "steps": j.steps, **{n: row[n] for n in objectives}} for j, row in best]


def _keeps(row: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(row.get(name, math.inf) <= most for name, most in limits.items())


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def _why_none(rows: Sequence[Mapping[str, float]], limits: Mapping[str, float]) -> str:
    said = []
    for name, most in limits.items():
        least = min((row[name] for row in rows if math.isfinite(row.get(name, math.nan))), default=math.inf)
        if least > most:
            said.append(f"{name} must be at most {_shown(most)}, and the least was {_shown(least)}")
    if said:
        return f"No trial keeps the constraints: {'; '.join(said)}."
    return "No trial keeps all constraints at once." if limits else "No trial has finite values for all objectives."


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
