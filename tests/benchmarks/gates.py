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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from pipelines.evaluation.catalogue import METRICS
from pipelines.evaluation.labels import macro_difference
from pipelines.evaluation.suites.quality import perplexity
from registry.gates import Gate, decide
from registry.statistics import LEVEL, Estimate, paired_difference, percentile_difference

RUNS = 1000
ALPHA = (1 - LEVEL) / 2
TOLERANCE = 0.1  # by which more equal versions may pass than was told

Values = NDArray[np.float64]
Sides = tuple[Any, Any]
"""Candidate and champion on the same rows."""
Draw = Callable[[np.random.Generator, int, float], Sides]
"""Both on so many rows, the candidate worse by so much on the whole."""
Compare = Callable[[Any, Any], Estimate]


def as_losses(candidate: Values, champion: Values) -> Estimate:
    return paired_difference(candidate, champion, higher_is_better=False)


def as_scores(candidate: Values, champion: Values) -> Estimate:
    return paired_difference(candidate, champion, higher_is_better=True, bounds=METRICS["chrf"].bounds)


def as_latencies(candidate: Values, champion: Values) -> Estimate:
    return percentile_difference(candidate, champion, 0.95, higher_is_better=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How two versions answer, how they are compared, the margin between them that is allowed, and on how many rows
    they are judged; `refused`: on so many rows, which are too few for any answer."""

    name: str
    draw: Draw
    margin: float
    compare: Compare
    rows: tuple[int, ...]
    refused: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How many of RUNS evaluations passed, how many said that no number of rows like this has an interval, and in what
    share the gates said that an equal version would pass."""

    passed: int
    refused: int
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


def zero_inflated(share: float, least: float, most: float) -> Draw:
    """Scores such as chrF of a champion that is nearly always right, and of a candidate that says the same but on a
    `share` of rows, where it loses all that it is worse by; an equal one wins as often as it loses."""

    def draw(random: np.random.Generator, rows: int, worse: float) -> Sides:
        champion = 0.9 + 0.1 * random.random(rows)
        candidate, which, lost = champion.copy(), random.random(rows), random.uniform(least, most, rows)
        fails = which < (share if worse else share / 2)
        candidate[fails] = np.maximum(champion - lost, 0)[fails]
        if not worse:
            fails = which > 1 - share / 2
            champion[fails] = np.maximum(candidate - lost, 0)[fails]
        return candidate, champion

    return draw


def same_answers(draw: Draw) -> Draw:
    """An equal candidate that says on every row just what the champion says."""

    def drawn(random: np.random.Generator, rows: int, worse: float) -> Sides:
        candidate, champion = draw(random, rows, worse)
        return (candidate, champion) if worse else (champion, champion)

    return drawn


def graded(random: np.random.Generator, rows: int, worse: float) -> Sides:
    """Scores of all sizes, of which the candidate's are now higher, now lower."""
    champion = random.beta(4, 2, rows)
    swing = 0.4 * champion * (1 - champion)
    return champion * (1 - 1.5 * worse) + swing * random.uniform(-1, 1, rows), champion


def perplexity_of(noise: Callable[[np.random.Generator, int], Values]) -> Draw:
    """Rows' losses and tokens; the mean loss of the champion is 1, and its perplexity e."""

    def draw(random: np.random.Generator, rows: int, worse: float) -> Sides:
        tokens, champion = random.integers(5, 40, rows), random.gamma(2, 0.5, rows)
        candidate = champion + np.log1p(worse / np.e) + 0.3 * noise(random, rows)
        return list(zip(candidate, tokens, strict=True)), list(zip(champion, tokens, strict=True))

    return draw


def slower(random: np.random.Generator, rows: int, worse: float) -> Sides:
    """Milliseconds of rows that take long or not, each time with noise of the machine's own."""
    row = 150 + random.gamma(4, 30, rows)
    return row + worse + random.exponential(40, rows), row + random.exponential(40, rows)


def slow_on_a_few(random: np.random.Generator, rows: int, worse: float) -> Sides:
    """Milliseconds of which the candidate takes 400 more on 6 % of the rows, or just as long."""
    champion = 150 + random.gamma(4, 50, rows)
    return champion + 400 * (random.random(rows) < (0.06 if worse else 0.0)), champion


def _slow_on_a_few_margin() -> float:
    times = stats.gamma(4, scale=50)
    return float(
        optimize.brentq(lambda t: 0.94 * times.sf(t) + 0.06 * times.sf(t - 400) - 0.05, 0, 900) - times.isf(0.05)
    )


def labelled(labels: int, rare: float | None) -> Draw:
    """Expected labels and answers, right on nine of ten rows; one label is as rare as that (None: as frequent as the
    others) and always answered rightly. A worse candidate answers that label never rightly, or the first label less
    often."""

    def draw(random: np.random.Generator, rows: int, worse: float) -> Sides:
        shares = np.full(labels, (1 - (rare or 1 / labels)) / (labels - 1))
        shares[-1] = rare or 1 / labels
        wanted = random.choice(labels, size=rows, p=shares)
        right = random.random((2, rows)) < 0.9
        if rare is not None:
            right[:, wanted == labels - 1] = True
            right[0, wanted == labels - 1] = not worse
        else:
            f1 = 1.8 / 1.9 - labels * worse  # of recall r without false ones it is 2 r / (1 + r)
            right[0] = np.where(wanted == 0, random.random(rows) < f1 / (2 - f1), right[0])
        ours, theirs = ([(f"label {w}", f"label {w}" if r else "?") for w, r in zip(wanted, side, strict=True)]
                        for side in right)  # fmt: skip
        return ours, theirs

    return draw


_FEW_FAR_LOWER = zero_inflated(0.02, 0.8, 0.9)
CASES = (
    Case(name="exact match 90 %, differ on 10 %", draw=exact_match(0.9, 0.1), margin=0.05, compare=as_scores,
         rows=(200, 400, 1000)),
    Case(name="exact match 70 %, differ on 20 %", draw=exact_match(0.7, 0.2), margin=0.1, compare=as_scores,
         rows=(120, 300, 1000)),
    Case(name="exact match 50 %, differ on 30 %", draw=exact_match(0.5, 0.3), margin=0.05, compare=as_scores,
         rows=(400, 1000, 2000)),
    Case(name="loss, even differences", draw=loss(_even, 0.3), margin=0.1, compare=as_losses,
         rows=(60, 120, 400)),
    Case(name="loss, far worse on a few rows", draw=loss(_some_far_worse, 0.3), margin=0.1, compare=as_losses,
         rows=(60, 120, 400)),
    Case(name="loss, far better on a few rows", draw=loss(_some_far_better, 0.3), margin=0.1, compare=as_losses,
         rows=(60, 120, 400)),
    Case(name="chrF, 0.85 lower on 2 %", draw=_FEW_FAR_LOWER, margin=0.017, compare=as_scores,
         rows=(120, 400)),
    Case(name="chrF, 0.85 lower on 2 %, else the same", draw=same_answers(_FEW_FAR_LOWER), margin=0.017,
         compare=as_scores, rows=(60, 120, 240)),
    Case(name="chrF, 0.6 lower on 5 %", draw=zero_inflated(0.05, 0.3, 0.9), margin=0.03, compare=as_scores,
         rows=(60, 120, 400)),
    Case(name="chrF of all sizes", draw=graded, margin=0.03, compare=as_scores, rows=(120, 400)),
    Case(name="perplexity, even differences", draw=perplexity_of(_even), margin=0.3, compare=perplexity,
         rows=(60, 120, 400), refused=(5,)),
    Case(name="perplexity, far worse on a few rows", draw=perplexity_of(_some_far_worse), margin=0.3,
         compare=perplexity, rows=(60, 120, 400)),
    Case(name="p95 latency, all rows slower", draw=slower, margin=100, compare=as_latencies,
         rows=(96, 200, 400), refused=(24, 71)),
    Case(name="p95 latency, 400 ms slower on 6 %", draw=slow_on_a_few, margin=_slow_on_a_few_margin(),
         compare=as_latencies, rows=(96, 200, 400), refused=(24,)),
    Case(name="macro F1, a label of 1 % never right", draw=labelled(10, 0.01), margin=0.1,
         compare=macro_difference, rows=(530, 1000), refused=(100, 200, 400)),
    Case(name="macro F1 of four labels", draw=labelled(4, None), margin=0.05, compare=macro_difference,
         rows=(220, 400), refused=(60,)),
)  # fmt: skip


def passes(case: Case, rows: int, *, worse: float, seed: int = 0, runs: int = RUNS) -> Passes:
    """RUNS evaluations, each judged by a gate that allows the case's margin."""
    gate = Gate(metric="m", must="not_worse", against="champion", margin=case.margin)
    random = np.random.default_rng(seed)
    passed, refused, told = 0, 0, []
    for _ in range(runs):
        compared = case.compare(*case.draw(random, rows, worse)).to_json()
        found = {"metrics": {"m": {"vs_champion": compared}}, "slices": {}}
        (entry,) = decide([gate], found, on_underpowered="refuse", first=False).gates
        passed += entry["decision"] == "pass"
        refused += entry["decision"] == "underpowered" and "no interval on fewer than" in entry["reason"]
        told.append(entry["power"] or 0.0)
    return Passes(passed=passed, refused=refused, told=float(np.mean(told)))


def most_passes() -> int:
    """More of RUNS than this would be shown, at 99 %, to be more than ALPHA."""
    return int(stats.binom.ppf(0.99, RUNS, ALPHA))


def least_passes(told: float) -> int:
    """Fewer of RUNS than this would be shown, at 99 %, to be less than the share that was told."""
    return int(stats.binom.ppf(0.01, RUNS, told))


def most_equal(told: float) -> int:
    """More of RUNS than this would be shown, at 99 %, to be over the share that was told by more than TOLERANCE."""
    return int(stats.binom.ppf(0.99, RUNS, min(1.0, told + TOLERANCE)))


def main() -> None:
    short = "--short" in sys.argv
    begun, broken = time.monotonic(), 0
    print(f"{RUNS} evaluations a line; worse by the margin: at most {most_passes()} may pass (2.5 %, binomial 99 %)")
    print(f"{'':39} {'margin':>7} {'rows':>5} {'worse pass':>11} {'equal pass':>11} {'told':>6} {'must be':>14}")
    for case in CASES:
        for rows in case.refused:
            found = passes(case, rows, worse=case.margin, runs=100)
            broken += (kept := found.refused == 100) is False
            print(f"{case.name:39} {case.margin:7.3f} {rows:5}   no verdict, as must be{'' if kept else '  BROKEN'}")
        for rows in case.rows[: 2 if short else None]:
            worse, equal = (passes(case, rows, worse=w) for w in (case.margin, 0.0))
            least, most = least_passes(equal.told), most_equal(equal.told)
            kept = worse.passed <= most_passes() and least <= equal.passed <= most
            broken += not kept
            line = f"{case.name:39} {case.margin:7.3f} {rows:5} {worse.passed / RUNS:11.1%} {equal.passed / RUNS:11.1%}"
            print(
                f"{line} {equal.told:6.1%} {least / RUNS:6.1%}-{most / RUNS:6.1%}{'' if kept else '  BROKEN'}",
                flush=True,
            )
    print(f"{broken} promises broken, {time.monotonic() - begun:.0f} s")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
