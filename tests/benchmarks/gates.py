"""Do gates keep what they promise? Versions that are worse by exactly the margin pass in at most 2.5 % of evaluations,
and equal ones in the share that the gate itself tells: 1,000 simulated evaluations for each line.

    python tests/benchmarks/gates.py [--short]

An evaluation is drawn, compared and judged by the code that judges real ones. `told` is the mean of the power that the
gates' entries state; the bounds are binomial, at 99 %. The program fails when a promise is broken.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from registry.gates import Gate, decide
from registry.statistics import LEVEL, paired_difference

RUNS = 1000
ALPHA = (1 - LEVEL) / 2

Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], tuple[Values, Values]]
"""Candidate and champion on so many rows, the candidate worse by so much on the whole."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How two versions answer, the margin between them that is allowed, and on how many rows they are judged."""

    name: str
    draw: Draw
    margin: float
    higher_is_better: bool
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How many of RUNS evaluations passed, and in what share the gates said that an equal version would."""

    passed: int
    told: float


def exact_match(right: float, differ: float) -> Draw:
    """The champion is right on `right` of the rows; the two differ on `differ` of them."""

    def draw(random: np.random.Generator, rows: int, worse: float) -> tuple[Values, Values]:
        gained, lost = (differ - worse) / 2, (differ + worse) / 2
        outcome = random.choice(4, size=rows, p=[right - lost, gained, lost, 1 - right - gained])
        return np.isin(outcome, (0, 1)).astype(float), np.isin(outcome, (0, 2)).astype(float)

    return draw


def loss(noise: Callable[[np.random.Generator, int], Values], deviation: float) -> Draw:
    """Row losses of a skewed champion, and differences with this noise (mean 0, deviation 1)."""

    def draw(random: np.random.Generator, rows: int, worse: float) -> tuple[Values, Values]:
        champion = random.gamma(2, 1, rows)
        return champion + worse + deviation * noise(random, rows), champion

    return draw


def _even(random: np.random.Generator, rows: int) -> Values:
    return random.normal(size=rows)


def _some_far_worse(random: np.random.Generator, rows: int) -> Values:
    return random.exponential(size=rows) - 1


def _some_far_better(random: np.random.Generator, rows: int) -> Values:
    return 1 - random.exponential(size=rows)


CASES = (
    Case(name="exact match 90 %, differ on 10 %", draw=exact_match(0.9, 0.1), margin=0.05, higher_is_better=True,
         rows=(200, 400, 1000)),
    Case(name="exact match 70 %, differ on 20 %", draw=exact_match(0.7, 0.2), margin=0.1, higher_is_better=True,
         rows=(120, 300, 1000)),
    Case(name="exact match 50 %, differ on 30 %", draw=exact_match(0.5, 0.3), margin=0.05, higher_is_better=True,
         rows=(400, 1000, 2000)),
    Case(name="loss, even differences", draw=loss(_even, 0.3), margin=0.1, higher_is_better=False,
         rows=(60, 120, 400)),
    Case(name="loss, far worse on a few rows", draw=loss(_some_far_worse, 0.3), margin=0.1, higher_is_better=False,
         rows=(60, 120, 400)),
    Case(name="loss, far better on a few rows", draw=loss(_some_far_better, 0.3), margin=0.1, higher_is_better=False,
         rows=(60, 120, 400)),
)  # fmt: skip


def passes(case: Case, rows: int, *, worse: float, seed: int = 0) -> Passes:
    """RUNS evaluations, each judged by a gate that allows the case's margin."""
    gate = Gate(metric="m", must="not_worse", against="champion", margin=case.margin)
    random = np.random.default_rng(seed)
    passed, told = 0, []
    for _ in range(RUNS):
        candidate, champion = case.draw(random, rows, worse)
        compared = paired_difference(candidate, champion, higher_is_better=case.higher_is_better).to_json()
        found = {"metrics": {"m": {"vs_champion": compared}}, "slices": {}}
        (entry,) = decide([gate], found, on_underpowered="refuse", first=False).gates
        passed += entry["decision"] == "pass"
        told.append(entry["power"] or 0.0)
    return Passes(passed=passed, told=float(np.mean(told)))


def most_passes() -> int:
    """More of RUNS than this would be shown, at 99 %, to be more than ALPHA."""
    return int(stats.binom.ppf(0.99, RUNS, ALPHA))


def least_passes(told: float) -> int:
    """Fewer of RUNS than this would be shown, at 99 %, to be less than the share that was told."""
    return int(stats.binom.ppf(0.01, RUNS, told))


def main() -> None:
    short = "--short" in sys.argv
    begun, broken = time.monotonic(), 0
    print(f"{RUNS} evaluations a line; worse by the margin: at most {most_passes()} may pass (2.5 %, binomial 99 %)")
    print(f"{'':36} {'margin':>7} {'rows':>5} {'worse pass':>11} {'equal pass':>11} {'told':>6} {'least':>6}")
    for case in CASES:
        for rows in case.rows[: 2 if short else None]:
            worse, equal = (passes(case, rows, worse=w) for w in (case.margin, 0.0))
            kept = worse.passed <= most_passes() and equal.passed >= least_passes(equal.told)
            broken += not kept
            line = f"{case.name:36} {case.margin:7.2f} {rows:5} {worse.passed / RUNS:11.1%} {equal.passed / RUNS:11.1%}"
            print(
                f"{line} {equal.told:6.1%} {least_passes(equal.told) / RUNS:6.1%}{'' if kept else '  BROKEN'}",
                flush=True,
            )
    print(f"{broken} promises broken, {time.monotonic() - begun:.0f} s")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
