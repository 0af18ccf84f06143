"""Estimates with intervals, paired comparisons, and how many rows a comparison needs.

Everything is seeded and vectorised; numpy and scipy.special are imported when a function is called, so that a
command that only prints a stored estimate does not pay for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from infra.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.float64]

Bounds = tuple[float, float]
"""The least and the greatest value that a metric can have."""
LEVEL = 0.95
RESAMPLES = 2000
_BLOCK = 250_000  # resampled numbers held at once: 2 MB, which caches hold


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its confidence interval at `level`, from `n` rows. An end that is not known is infinite. `p_value`,
    of a paired difference, is that of an exact test (`sign_test`) that there is none; `error`, where it is known, how
    much the interval's bad end itself varies (its standard error); `least_n`, where there are too few rows for an
    interval, from how many on there would be one."""

    estimate: float
    low: float
    high: float
    n: int
    higher_is_better: bool
    level: float = LEVEL
    p_value: float | None = None
    error: float | None = None
    least_n: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract's object; what is not finite becomes null."""
        return {
            "estimate": _finite(self.estimate),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "level": self.level,
            "n": self.n,
            "higher_is_better": self.higher_is_better,
            **{name: value for name in ("p_value", "error", "least_n") if (value := getattr(self, name)) is not None},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Estimate:
        """The inverse of `to_json`: a null end is infinite, a null estimate is NaN."""
        return cls(
            estimate=_number(value["estimate"], math.nan),
            low=_number(value["low"], -math.inf),
            high=_number(value["high"], math.inf),
            level=float(value["level"]),
            n=int(value["n"]),
            higher_is_better=bool(value["higher_is_better"]),
            p_value=value.get("p_value"),
            error=value.get("error"),
            least_n=value.get("least_n"),
        )


def mean_ci(
    values: Values,
    *,
    higher_is_better: bool,
    bounds: Bounds | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of one number a row, which lies within `bounds` where the metric has such.

    Values that are all 0 or 1 get Wilson's score interval (Wilson 1927), which stays honest at 0 % and 100 %
    and on few rows, where a bootstrap has no width. Others within bounds get Gaffke's bounds (`reweighted`), which
    hold for rows that were not seen as well; all others the expanded percentile bootstrap (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", section 5.3): the percentile interval, with tails
    widened to what Student's t asks for on `n` rows, or the studentized one on the side where that reaches further.
    Fewer than six rows (of 95 %) have no interval.

    Raises UsageError for no rows, or a value that is not finite.
    """
    x = _clean(values)
    mean, n = float(x.mean()), len(x)
    if _binary(x):
        low, high = wilson(mean, n, level)
        return Estimate(estimate=mean, low=low, high=high, n=n, level=level, higher_is_better=higher_is_better)
    return _mean(x, bounds, higher_is_better, level, resamples, seed)


def paired_difference(
    candidate: Values,
    other: Values,
    *,
    higher_is_better: bool,
    bounds: Bounds | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of ``candidate - other`` over the same rows, in the metric's own unit; both sides lie within `bounds`
    where the metric has such.

    `higher_is_better` is the metric's: for a loss, a negative difference is a gain. Where both sides are all 0 or
    1 the interval is Newcombe's for paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method
    10). Within bounds it is Gaffke's (`reweighted`): a row that was not seen may differ by all that lies between them,
    so a version that fails wholly, but on few rows, is not taken for an equal one because they were not drawn.
    Otherwise it is the expanded percentile bootstrap over rows, as in `mean_ci`, which cannot know of such rows; but
    where all rows differ alike, or not at all, others may differ by as much as values lie apart: as many of them as
    Wilson's interval of none leaves room for.

    Raises UsageError for no rows, unequal lengths, or a value that is not finite.
    """
    x, y = _clean(candidate), _clean(other)
    if len(x) != len(y):
        raise UsageError(f"A paired comparison needs the same rows on both sides, not {len(x)} and {len(y)}.")
    difference, p_value = float((x - y).mean()), sign_test(x, y)
    if _binary(x) and _binary(y):
        low, high = _newcombe(x, y, level)
    elif bounds is None and len(x) > 1 and _constant(x - y):
        apart = float(max(x.max(), y.max()) - min(x.min(), y.min()))
        share = wilson(0.0, len(x), level)[1]  # of other rows, that none among these leaves room for
        low, high = (difference + share * (end - difference) for end in (-apart, apart))
    else:
        apart = bounds[1] - bounds[0] if bounds is not None else math.inf
        within = (-apart, apart) if bounds is not None else None
        return replace(_mean(x - y, within, higher_is_better, level, resamples, seed), p_value=p_value)
    return Estimate(
        estimate=difference,
        low=low,
        high=high,
        n=len(x),
        level=level,
        higher_is_better=higher_is_better,
        p_value=p_value,
    )


def sign_test(x: Values, y: Values) -> float:
    """The two-sided p-value of the exact sign test (Dixon and Mood 1946) on paired rows: how likely a split of the rows
    that differ is, that is as uneven as this one or more, if either side were the better one as often. For values of 0
    and 1 it is McNemar's exact test. 1 where no row differs."""
    from scipy.special import bdtr

    d = _clean(x) - _clean(y)
    more, less = int((d > 1e-9).sum()), int((d < -1e-9).sum())
    return min(1.0, 2 * float(bdtr(min(more, less), more + less, 0.5))) if more + less else 1.0


def percentile_ci(values: Values, q: float, *, higher_is_better: bool, level: float = LEVEL) -> Estimate:
    """The `q`-quantile (0 < q < 1), by linear interpolation, with a distribution-free interval.

    The ends are order statistics whose ranks are binomial quantiles (Conover, Practical Nonparametric Statistics,
    3rd ed., section 3.2), so the coverage is at least `level`. An end for which there are too few rows (p95 needs
    72 for a two-sided 95 %) is infinite.
    """
    import numpy as np
    from scipy.special import bdtr

    if not 0 < q < 1:
        raise UsageError(f"A quantile lies between 0 and 1, not at {q}.")
    x = np.sort(_clean(values))
    n, tail = len(x), (1 - level) / 2
    least = math.ceil(math.log(tail) / math.log(max(q, 1 - q)) - 1e-9)  # rows for both ends
    below = bdtr(np.arange(n), n, q)  # P(at most k of n rows lie under the quantile), k = 0 .. n-1
    # x[r-1] <= quantile unless fewer than r rows lie under it: P = below[r-1] <= tail
    lower = int(np.searchsorted(below, tail, side="right"))  # the largest such r; 0: none
    # x[s-1] >= quantile unless at least s rows lie under it: P = 1 - below[s-1] <= tail
    upper = int(np.searchsorted(below, 1 - tail, side="left")) + 1  # the smallest such s; n+1: none
    return Estimate(
        estimate=float(np.quantile(x, q)),
        low=float(x[lower - 1]) if lower >= 1 else -math.inf,
        high=float(x[upper - 1]) if upper <= n else math.inf,
        n=n,
        level=level,
        higher_is_better=higher_is_better,
        least_n=least if n < least else None,
    )


def percentile_difference(
    candidate: Values,
    other: Values,
    q: float,
    *,
    higher_is_better: bool,
    level: float = LEVEL,
) -> Estimate:
    """The difference of two `q`-quantiles over the same rows.

    Made from both sides' intervals of order statistics (`percentile_ci`) as Newcombe's method 10 is from Wilson's, the
    method of variance estimates recovery (Zou and Donner 2008, Statistics in Medicine 27:1693):
    ``low = d - sqrt((x - x_low)^2 - 2 r (x - x_low) (y_high - y) + (y_high - y)^2)``. The correlation r of two sample
    quantiles is that of the rows' lying above them, phi, here with Newcombe's correction for continuity. A bootstrap
    knows of nothing above what was seen: on 24 rows a version slower by just the margin passed in 22 % of evaluations
    by it, on 72 in up to 10 %. Fewer rows than one side's interval needs, 72 for p95, have none.
    """
    import numpy as np

    x, y = _clean(candidate), _clean(other)
    if len(x) != len(y):
        raise UsageError(f"A paired comparison needs the same rows on both sides, not {len(x)} and {len(y)}.")
    ours, theirs = (percentile_ci(side, q, higher_is_better=higher_is_better, level=level) for side in (x, y))
    difference = ours.estimate - theirs.estimate
    low, high = -math.inf, math.inf
    if ours.least_n is None:
        above, other_above = x > ours.estimate, y > theirs.estimate
        both, only_x = int(np.sum(above & other_above)), int(np.sum(above & ~other_above))
        only_y = int(np.sum(~above & other_above))
        phi = _phi(both, only_x, only_y, len(x) - both - only_x - only_y)
        low = difference - _joint(ours.estimate - ours.low, theirs.high - theirs.estimate, phi)
        high = difference + _joint(ours.high - ours.estimate, theirs.estimate - theirs.low, phi)
    return replace(ours, estimate=difference, low=low, high=high)


def resampled(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    n: int,
    *,
    higher_is_better: bool,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Estimate]:
    """Statistics of `n` rows that are no means, such as perplexity, by the expanded percentile bootstrap
    (Hesterberg 2015, section 5.3), or the studentized one of their jackknife's pseudo-values (Tukey 1958; Efron and
    Tibshirani 1993, section 11.4), whose mean they nearly are, on the side where that reaches further, with the
    statistic's own bend: its value where the rows' weights lean so far towards that end (the least favourable family;
    section 22.6). Fewer than six rows (of 95 %) have no interval.

    `statistic` is given how often each row counts, [draws, rows], and gives k numbers for each draw, [draws, k]; NaN
    where a draw has none, which is left out. Of two sides' difference the rows are thereby drawn in pairs.
    """
    import numpy as np

    if n < 1:
        raise UsageError("An estimate needs at least one row.")
    values = statistic(np.ones((1, n)))[0]
    if n < (least := _fewest(level)):
        return [
            Estimate(
                estimate=float(value), low=-math.inf, high=math.inf, n=n, level=level,
                higher_is_better=higher_is_better, least_n=least,
            )
            for value in values
        ]  # fmt: skip
    random, drawn = np.random.default_rng(seed), []
    without = np.concatenate([statistic(1.0 - np.eye(size, n, k=done)) for done, size in _offsets(_blocks(n, n))])
    with np.errstate(over="ignore", invalid="ignore"):  # of a perplexity beyond all bounds there are none
        pseudo = n * values - (n - 1) * without
        centred = pseudo - pseudo.mean(axis=0)
        moments = []
        for size in _blocks(n, resamples):
            counts = _counts(random, n, size)
            drawn.append(statistic(counts))
            moments.append((counts @ centred / n, counts @ centred**2 / n))
        means, squares = (np.concatenate(part) for part in zip(*moments, strict=True))
        errors = np.sqrt(np.maximum(squares - means**2, 0) / (n - 1))
    found = []
    for k, (value, column) in enumerate(zip(values, np.concatenate(drawn).T, strict=True)):
        known = column[np.isfinite(column)]
        low, high = _tails(known, n, level) if len(known) else (-math.inf, math.inf)
        if np.isfinite(centred[:, k]).all():
            moved = np.array(_studentized(centred[:, k], means[:, k], errors[:, k], 1 - 2 * _tail(n, level)))
            square = float((centred[:, k] ** 2).mean())
            tilted = 1 + moved[:, None] * centred[:, k] / square if square > 0 else np.ones((2, n))
            bent = statistic(np.maximum(tilted, 0))[:, k]
            low, high = np.nanmin([low, value + moved[0], bent[0]]), np.nanmax([high, value + moved[1], bent[1]])
        found.append(
            Estimate(
                estimate=float(value),
                low=float(low),
                high=float(high),
                n=n,
                level=level,
                higher_is_better=higher_is_better,
            )
        )
    return found


def reweighted(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    counts: Sequence[int],
    *,
    higher_is_better: bool,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of rows that a row which was not seen could move by so much and no further, by Gaffke's bounds
    (Gaffke 2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
    variable"; Learned-Miller and Thomas 2019, "A new confidence interval for the mean of a bounded random variable"):
    the quantile of the statistic with exponential weights on the rows, and on one more that is the worst, or the best,
    there could be.

    Of values that are all at the ends it is Clopper and Pearson's interval, of equal ones the rule of three. That it
    holds for all others was never proved, nor was it ever found not to; tests/benchmarks/gates.py holds it to its
    promise. Bounds that are proved (Hoeffding; Waudby-Smith and Ramdas 2024, by betting) ask for nearly twice the rows.

    `statistic` is given weights [draws, kinds + 2] and gives a number for each draw: those of as many kinds of rows as
    there are `counts`, then that of the row that would lower it most and of the one that would raise it most. Fewer
    than six rows (of 95 %) have no interval.
    """
    import numpy as np

    of, n = np.asarray(counts, dtype=float), int(sum(counts))
    if n < 1:
        raise UsageError("An estimate needs at least one row.")
    told, kinds = float(statistic(np.append(of, (0.0, 0.0))[None])[0]), len(of)
    least: int | None = _fewest(level)
    if n < _fewest(level):
        low, high = -math.inf, math.inf
    else:
        least, random, lowered, raised = None, np.random.default_rng(seed), [], []
        for size in _blocks(kinds, resamples):
            weights = np.zeros((size, kinds + 2))
            if kinds == n:
                weights[:, :-1] = random.standard_exponential((size, n + 1))
            else:  # k exponential weights add up to a gamma one
                weights[:, :-1] = random.standard_gamma(np.append(of, 1.0), (size, kinds + 1))
            lowered.append(statistic(weights))
            weights[:, [-2, -1]] = weights[:, [-1, -2]]
            raised.append(statistic(weights))
        low = float(np.quantile(np.concatenate(lowered), (1 - level) / 2))
        high = float(np.quantile(np.concatenate(raised), (1 + level) / 2))
    return Estimate(
        estimate=told, low=low, high=high, n=n, level=level, higher_is_better=higher_is_better, least_n=least
    )


def power_of(estimate: Estimate, distance: float) -> float:
    """The share of repetitions, on as many rows, in which an interval's bad end clears a threshold that lies `distance`
    on the bad side of the truth: ``Phi((distance - h) / se)``.

    h is how far the interval reaches to the bad side, which skew and a method's caution lengthen, and se the bad end's
    own standard error where the estimate has it; else the larger of ``width / (2 z)`` and ``h / z``, since h itself
    varies with the mean where rows are skewed to that side. NaN where an end is not known, or there is no width to go
    by.
    """
    reach, error = _spread(estimate)
    if not math.isfinite(reach) or not reach > 0:
        return math.nan
    if error < 1e-12:  # rows that are all equal: as seen, every repetition is the same
        return float(distance > reach)
    from statistics import NormalDist

    return NormalDist().cdf((distance - reach) / error)


def detectable(estimate: Estimate, *, power: float = 0.8) -> float:
    """The least distance that these rows show in `power` of all repetitions: the inverse of `power_of`."""
    reach, error = _spread(estimate)
    return reach + _z(power) * error


def rows_for(estimate: Estimate, distance: float, *, power: float = 0.8) -> int:
    """About how many rows make `distance` detectable, from an interval on some: reach and error fall with the root of
    the number of rows, so for an even interval it is ``((z_{1-alpha/2} + z_power) * deviation / distance)^2`` (Chow,
    Shao, Wang: Sample Size Calculations in Clinical Research, 2nd ed., section 3.1). Where the bad end's error is
    known, what the reach has beyond it is room for rows that were not seen, and falls with their number. Raises
    UsageError where no number of rows does."""
    reach, error = _spread(estimate)
    now = reach + _z(power) * error
    if not distance > 0 or not math.isfinite(now):
        raise UsageError(f"No number of rows shows a difference of {distance}.")
    unseen = max(0.0, reach - _z((1 + estimate.level) / 2) * error) if estimate.error is not None else 0.0
    rest = now - unseen
    # unseen * r^2 + rest * r = distance, r the root of the share that these rows are of those needed
    root = 2 * distance / (rest + math.sqrt(rest * rest + 4 * unseen * distance)) if now > 0 else math.inf
    return max(2, math.ceil(estimate.n / root**2))


def _spread(estimate: Estimate) -> tuple[float, float]:
    """How far an interval reaches to the bad side, and that end's standard error, for `power_of`."""
    bad = estimate.estimate - estimate.low if estimate.higher_is_better else estimate.high - estimate.estimate
    if estimate.error is not None:
        return bad, estimate.error
    return bad, max((estimate.high - estimate.low) / 2, bad) / _z((1 + estimate.level) / 2)


def _clean(values: Values) -> NDArray[np.float64]:
    import numpy as np

    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise UsageError("An estimate needs at least one row.")
    if not np.isfinite(x).all():
        raise UsageError(f"{int((~np.isfinite(x)).sum())} of {len(x)} values to estimate from are not finite.")
    return x


def _constant(x: NDArray[np.float64]) -> bool:
    return float(x.max() - x.min()) < 1e-9  # 0.3 - 0.2 is not quite 0.5 - 0.4


def _binary(x: NDArray[np.float64]) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _z(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def wilson(p: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927)."""
    z2 = _z((1 + level) / 2) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _newcombe(x: NDArray[np.float64], y: NDArray[np.float64], level: float) -> tuple[float, float]:
    n = len(x)
    both, only_x = float((x * y).sum()), float((x * (1 - y)).sum())
    only_y, neither = float((y * (1 - x)).sum()), float(((1 - x) * (1 - y)).sum())
    p, q = float(x.mean()), float(y.mean())
    (p_low, p_high), (q_low, q_high) = wilson(p, n, level), wilson(q, n, level)
    phi = _phi(both, only_x, only_y, neither)
    low = p - q - _joint(p - p_low, q_high - q, phi)
    high = p - q + _joint(p_high - p, q - q_low, phi)
    return max(-1.0, low), min(1.0, high)


def _phi(both: float, only_x: float, only_y: float, neither: float) -> float:
    """The correlation of pairs of yes and no, corrected for continuity where it is positive (Newcombe 1998)."""
    product = (both + only_x) * (only_y + neither) * (both + only_y) * (only_x + neither)
    if product <= 0:
        return 0.0
    n, cross = both + only_x + only_y + neither, both * neither - only_x * only_y
    return (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)


def _joint(one: float, other: float, correlation: float) -> float:
    """How far the difference of two estimates reaches whose own intervals reach so far."""
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


def _bootstrap(x: NDArray[np.float64], level: float, resamples: int, seed: int) -> tuple[float, float]:
    """The expanded percentile interval, or the studentized one (Efron and Tibshirani 1993, section 12.5) on the side
    where that reaches further.

    A percentile interval follows skew a third of the way only: a version that is far worse on a few rows would pass
    twice as often as promised. A resample's error is taken to be a quarter of the sample's at least, so that rows that
    are nearly all equal do not have an interval without end; and no end lies outside of what was seen. Of fewer rows
    than `_fewest` there is no interval, since what was seen is then all on one side too often.
    """
    import numpy as np

    n = len(x)
    if n < _fewest(level):
        return -math.inf, math.inf
    random = np.random.default_rng(seed)
    means, errors = [], []
    for size in _blocks(n, resamples):
        drawn = x[random.integers(0, n, (size, n))]
        means.append(drawn.mean(axis=1))
        errors.append(drawn.std(axis=1) / math.sqrt(n - 1))
    every = np.concatenate(means)
    low, high = _tails(every, n, level)
    further = _studentized(x, every, np.concatenate(errors), level)
    return min(low, further[0]), max(high, further[1])


def _studentized(
    x: NDArray[np.float64], means: NDArray[np.float64], errors: NDArray[np.float64], level: float
) -> tuple[float, float]:
    import numpy as np

    middle, error = float(x.mean()), float(x.std()) / math.sqrt(len(x) - 1)
    if not error > 0:
        return middle, middle
    students = (means - middle) / np.maximum(errors, error / 4)
    least, most = np.quantile(students, [(1 - level) / 2, (1 + level) / 2])
    return (
        max(float(x.min()), middle - float(most) * error),
        min(float(x.max()), middle - float(least) * error),
    )


def _mean(
    x: NDArray[np.float64], bounds: Bounds | None, higher_is_better: bool, level: float, resamples: int, seed: int
) -> Estimate:
    """A mean of values that are not all 0 or 1: Gaffke's bounds (`reweighted`) where there are bounds, else the
    bootstrap."""
    import numpy as np

    if bounds is None:
        low, high = _bootstrap(x, level, resamples, seed)
        few = _fewest(level) if len(x) < _fewest(level) else None
        return Estimate(
            estimate=float(x.mean()), low=low, high=high, n=len(x), level=level, higher_is_better=higher_is_better,
            least_n=few,
        )  # fmt: skip
    ends = min(bounds[0], float(x.min())), max(bounds[1], float(x.max()))
    values = np.append(x, ends)

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = weights @ values / weights.sum(axis=1)
        return found

    found = reweighted(
        mean, [1] * len(x), higher_is_better=higher_is_better, level=level, resamples=resamples, seed=seed
    )
    return replace(found, error=_end_error(x, ends[0] if higher_is_better else ends[1], level))


def _end_error(x: NDArray[np.float64], bound: float, level: float) -> float:
    """The standard error of the end towards `bound`, by the infinitesimal jackknife (Efron and Tibshirani 1993, section
    21.3): the end is nearly ``mean -+ z * deviation / sqrt(n)``, the deviation with one row at the bound."""
    n, away = len(x), x - x.mean()
    deviation = math.sqrt(float((away**2).mean()) + (bound - float(x.mean())) ** 2 / n)
    if deviation < 1e-12:
        return 0.0
    side = math.copysign(1.0, bound - float(x.mean()))
    moves = away + side * _z((1 + level) / 2) / math.sqrt(n) * (away**2 - (away**2).mean()) / (2 * deviation)
    return float(moves.std()) / math.sqrt(n)


def _fewest(level: float) -> int:
    """Rows from which on any interval of this level can keep to what was seen: on fewer, all of them lie on one side of
    the middle with more than its error, ``2 * 2^-n`` (the sign test's least p-value). Six for 95 %."""
    return math.ceil(math.log2(2 / (1 - level)) - 1e-9)


def _blocks(n: int, resamples: int) -> list[int]:
    size = max(1, min(resamples, _BLOCK // n))
    return [min(size, resamples - done) for done in range(0, resamples, size)]


def _counts(random: np.random.Generator, n: int, size: int) -> NDArray[np.float64]:
    """How often each of n rows is drawn, [size, n]: a multinomial draw, several times sooner than numpy's."""
    import numpy as np

    cells = random.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
    return np.bincount(cells.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _offsets(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    done = 0
    for size in sizes:
        yield done, size
        done += size


def _tails(drawn: NDArray[np.float64], n: int, level: float) -> tuple[float, float]:
    import numpy as np

    if n < 2:
        return -math.inf, math.inf
    tail = _tail(n, level)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _tail(n: int, level: float) -> float:
    """The share outside of either end, with which a percentile interval of n rows is as wide as Student's t."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None, missing: float) -> float:
    return missing if value is None else float(value)


def in_words(estimate: Mapping[str, Any] | None) -> str:
    """An estimate's JSON as text, such as ``0.712 [0.680, 0.744]``; an end that is not known is a dash."""
    if estimate is None:
        return ""
    middle, low, high = ("–" if estimate[k] is None else f"{estimate[k]:.3f}" for k in ("estimate", "low", "high"))
    return f"{middle} [{low}, {high}]"
