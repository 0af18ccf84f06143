"""Estimates with intervals, paired comparisons, and how many rows a comparison needs.

Everything is seeded and vectorised; numpy and scipy.special are imported when a function is called, so that a
command that only prints a stored estimate does not pay for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infra.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = Sequence[float] | NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
_BLOCK = 4_000_000  # resampled numbers held at once: 32 MB


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its confidence interval at `level`, from `n` rows. An end that is not known is infinite. `p_value`,
    of a paired difference, is that of an exact test (`sign_test`) that there is none."""

    estimate: float
    low: float
    high: float
    n: int
    higher_is_better: bool
    level: float = LEVEL
    p_value: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract's object; what is not finite becomes null."""
        return {
            "estimate": _finite(self.estimate),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "level": self.level,
            "n": self.n,
            "higher_is_better": self.higher_is_better,
            **({} if self.p_value is None else {"p_value": self.p_value}),
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
        )


def mean_ci(
    values: Values, *, higher_is_better: bool, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of one number a row.

    Values that are all 0 or 1 get Wilson's score interval (Wilson 1927), which stays honest at 0 % and 100 %
    and on few rows, where a bootstrap has no width. All others get the expanded percentile bootstrap (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", section 5.3): the percentile interval, with tails
    widened to what Student's t asks for on `n` rows, or the studentized one on the side where that reaches further.
    Fewer than six rows (of 95 %) have no interval.

    Raises UsageError for no rows, or a value that is not finite.
    """
    x = _clean(values)
    mean, n = float(x.mean()), len(x)
    if _binary(x):
        low, high = wilson(mean, n, level)
    else:
        low, high = _bootstrap(x, level, resamples, seed)
    return Estimate(estimate=mean, low=low, high=high, n=n, level=level, higher_is_better=higher_is_better)


def paired_difference(
    candidate: Values,
    other: Values,
    *,
    higher_is_better: bool,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of ``candidate - other`` over the same rows, in the metric's own unit.

    `higher_is_better` is the metric's: for a loss, a negative difference is a gain. Where both sides are all 0 or
    1 the interval is Newcombe's for paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method
    10); otherwise the expanded percentile bootstrap over rows, as in `mean_ci`. Where all rows differ alike, or
    not at all, rows that were not seen may still differ, by as much as values lie apart: as many of them as Wilson's
    interval of none leaves room for.

    Raises UsageError for no rows, unequal lengths, or a value that is not finite.
    """
    x, y = _clean(candidate), _clean(other)
    if len(x) != len(y):
        raise UsageError(f"A paired comparison needs the same rows on both sides, not {len(x)} and {len(y)}.")
    difference = float((x - y).mean())
    if _binary(x) and _binary(y):
        low, high = _newcombe(x, y, level)
    elif len(x) > 1 and _constant(x - y):
        apart = float(max(x.max(), y.max()) - min(x.min(), y.min()))
        share = wilson(0.0, len(x), level)[1]  # of other rows, that none among these leaves room for
        low, high = (difference + share * (end - difference) for end in (-apart, apart))
    else:
        low, high = _bootstrap(x - y, level, resamples, seed)
    return Estimate(
        estimate=difference,
        low=low,
        high=high,
        n=len(x),
        level=level,
        higher_is_better=higher_is_better,
        p_value=sign_test(x, y),
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
    )


def percentile_difference(
    candidate: Values,
    other: Values,
    q: float,
    *,
    higher_is_better: bool,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The difference of two `q`-quantiles over the same rows: a percentile bootstrap that draws rows in pairs."""
    import numpy as np

    x, y = _clean(candidate), _clean(other)
    if len(x) != len(y):
        raise UsageError(f"A paired comparison needs the same rows on both sides, not {len(x)} and {len(y)}.")
    random, n = np.random.default_rng(seed), len(x)
    drawn = []
    for size in _blocks(n, resamples):
        rows = random.integers(0, n, (size, n))
        drawn.append(np.quantile(x[rows], q, axis=1) - np.quantile(y[rows], q, axis=1))
    low, high = _tails(np.concatenate(drawn), n, level)
    return Estimate(
        estimate=float(np.quantile(x, q) - np.quantile(y, q)),
        low=low,
        high=high,
        n=n,
        level=level,
        higher_is_better=higher_is_better,
    )


def resampled(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    n: int,
    *,
    higher_is_better: bool,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Estimate]:
    """Statistics of `n` rows that are no means, such as F1, by the expanded percentile bootstrap
    (Hesterberg 2015, section 5.3).

    `statistic` is given how often each row counts, [draws, rows], and gives k numbers for each draw, [draws, k]; NaN
    where a draw has none, which is left out. Of two sides' difference the rows are thereby drawn in pairs.
    """
    import numpy as np

    if n < 1:
        raise UsageError("An estimate needs at least one row.")
    random = np.random.default_rng(seed)
    drawn = np.concatenate(
        [statistic(random.multinomial(n, np.full(n, 1 / n), size).astype(float)) for size in _blocks(n, resamples)]
    )
    found = []
    for value, column in zip(statistic(np.ones((1, n)))[0], drawn.T, strict=True):
        known = column[np.isfinite(column)]
        low, high = _tails(known, n, level) if len(known) else (-math.inf, math.inf)
        found.append(
            Estimate(estimate=float(value), low=low, high=high, n=n, level=level, higher_is_better=higher_is_better)
        )
    return found


def power_of(estimate: Estimate, distance: float) -> float:
    """The share of repetitions, on as many rows, in which an interval's bad end clears a threshold that lies `distance`
    on the bad side of the truth: ``Phi((distance - h) / se)``.

    h is how far the interval reaches to the bad side, which skew and a method's caution lengthen, and se the larger
    of ``width / (2 z)`` and ``h / z``, since h itself varies with the mean where rows are skewed to that side. NaN
    where an end is not known, or there is no width to go by.
    """
    reach, error = _spread(estimate)
    if not math.isfinite(reach) or not error > 0:
        return math.nan
    from statistics import NormalDist

    return NormalDist().cdf((distance - reach) / error)


def detectable(estimate: Estimate, *, power: float = 0.8) -> float:
    """The least distance that these rows show in `power` of all repetitions: the inverse of `power_of`."""
    reach, error = _spread(estimate)
    return reach + _z(power) * error


def rows_for(estimate: Estimate, distance: float, *, power: float = 0.8) -> int:
    """About how many rows make `distance` detectable, from an interval on some: reach and error fall with the root of
    the number of rows, so for an even interval it is ``((z_{1-alpha/2} + z_power) * deviation / distance)^2`` (Chow,
    Shao, Wang: Sample Size Calculations in Clinical Research, 2nd ed., section 3.1). Raises UsageError where no number
    of rows does."""
    now = detectable(estimate, power=power)
    if not distance > 0 or not math.isfinite(now):
        raise UsageError(f"No number of rows shows a difference of {distance}.")
    return max(2, math.ceil(estimate.n * (now / distance) ** 2))


def _spread(estimate: Estimate) -> tuple[float, float]:
    """How far a mean's interval reaches to the bad side, and its standard error, for `power_of`."""
    bad = estimate.estimate - estimate.low if estimate.higher_is_better else estimate.high - estimate.estimate
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
    product = (both + only_x) * (only_y + neither) * (both + only_y) * (only_x + neither)
    phi = 0.0
    if product > 0:  # the correlation of the pairs, corrected for continuity where it is positive
        cross = both * neither - only_x * only_y
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)
    down, up = p - p_low, q_high - q
    low = p - q - math.sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    up, down = p_high - p, q - q_low
    high = p - q + math.sqrt(max(0.0, up * up - 2 * phi * up * down + down * down))
    return max(-1.0, low), min(1.0, high)


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
    middle, error = float(x.mean()), float(x.std()) / math.sqrt(n - 1)
    if error > 0:
        students = (every - middle) / np.maximum(np.concatenate(errors), error / 4)
        least, most = np.quantile(students, [(1 - level) / 2, (1 + level) / 2])
        low = min(low, max(float(x.min()), middle - float(most) * error))
        high = max(high, min(float(x.max()), middle - float(least) * error))
    return low, high


def _fewest(level: float) -> int:
    """Rows from which on any interval of this level can keep to what was seen: on fewer, all of them lie on one side of
    the middle with more than its error, ``2 * 2^-n`` (the sign test's least p-value). Six for 95 %."""
    return math.ceil(math.log2(2 / (1 - level)) - 1e-9)


def _blocks(n: int, resamples: int) -> list[int]:
    size = max(1, min(resamples, _BLOCK // n))
    return [min(size, resamples - done) for done in range(0, resamples, size)]


def _tails(drawn: NDArray[np.float64], n: int, level: float) -> tuple[float, float]:
    import numpy as np
    from scipy.special import ndtr, stdtrit

    if n < 2:
        return -math.inf, math.inf
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


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
