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
    """A number with its confidence interval at `level`, from `n` rows. An end that is not known is infinite."""

    estimate: float
    low: float
    high: float
    n: int
    higher_is_better: bool
    level: float = LEVEL

    def to_json(self) -> dict[str, Any]:
        """The contract's object; what is not finite becomes null."""
        return {
            "estimate": _finite(self.estimate),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "level": self.level,
            "n": self.n,
            "higher_is_better": self.higher_is_better,
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
        )


def mean_ci(
    values: Values, *, higher_is_better: bool, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean of one number a row.

    Values that are all 0 or 1 get Wilson's score interval (Wilson 1927), which stays honest at 0 % and 100 %
    and on few rows, where a bootstrap has no width. All others get the expanded percentile bootstrap (Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", section 5.3): the percentile interval, with tails
    widened to what Student's t asks for on `n` rows. Fewer than two rows have no interval.

    Raises UsageError for no rows, or a value that is not finite.
    """
    x = _clean(values)
    mean, n = float(x.mean()), len(x)
    if _binary(x):
        low, high = _wilson(mean, n, level)
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
    10); otherwise the expanded percentile bootstrap over rows, as in `mean_ci`.

    Raises UsageError for no rows, unequal lengths, or a value that is not finite.
    """
    x, y = _clean(candidate), _clean(other)
    if len(x) != len(y):
        raise UsageError(f"A paired comparison needs the same rows on both sides, not {len(x)} and {len(y)}.")
    if _binary(x) and _binary(y):
        low, high = _newcombe(x, y, level)
    else:
        low, high = _bootstrap(x - y, level, resamples, seed)
    difference = float((x - y).mean())
    return Estimate(estimate=difference, low=low, high=high, n=len(x), level=level, higher_is_better=higher_is_better)


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
    """Statistics of `n` rows that are no means, such as F1, by the expanded percentile bootstrap of `mean_ci`.

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


def rows_needed(deviation: float, distance: float, *, level: float = LEVEL, power: float = 0.8) -> int:
    """Rows for a two-sided interval at `level` to clear a threshold that lies `distance` from the true mean of
    row differences with standard deviation `deviation`, in `power` of all repetitions.

    ``n = ((z_{1-alpha/2} + z_{power}) * deviation / distance)^2`` (Chow, Shao, Wang: Sample Size Calculations in
    Clinical Research, 2nd ed., section 3.1). Raises UsageError unless `distance` is positive.
    """
    if not distance > 0 or not math.isfinite(deviation):
        raise UsageError(f"No number of rows shows a difference of {distance}.")
    return max(2, math.ceil(((_z((1 + level) / 2) + _z(power)) * deviation / distance) ** 2))


def detectable(estimate: Estimate, *, power: float = 0.8) -> float | None:
    """The smallest true difference that as many rows show in `power` of all repetitions, the inverse of `rows_needed`:
    ``(z_{1-alpha/2} + z_{power}) * deviation / sqrt(n)``. None where the interval has no end, or no width."""
    width = estimate.high - estimate.low
    if not math.isfinite(width) or width <= 0:
        return None
    return (_z((1 + estimate.level) / 2) + _z(power)) * deviation_of(estimate) / math.sqrt(estimate.n)


def deviation_of(estimate: Estimate) -> float:
    """The rows' standard deviation, read back from a mean's interval: ``width / (2 z) * sqrt(n)``."""
    return (estimate.high - estimate.low) / (2 * _z((1 + estimate.level) / 2)) * math.sqrt(estimate.n)


def _clean(values: Values) -> NDArray[np.float64]:
    import numpy as np

    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise UsageError("An estimate needs at least one row.")
    if not np.isfinite(x).all():
        raise UsageError(f"{int((~np.isfinite(x)).sum())} of {len(x)} values to estimate from are not finite.")
    return x


def _binary(x: NDArray[np.float64]) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _z(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


def _wilson(p: float, n: int, level: float) -> tuple[float, float]:
    z2 = _z((1 + level) / 2) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _newcombe(x: NDArray[np.float64], y: NDArray[np.float64], level: float) -> tuple[float, float]:
    n = len(x)
    both, only_x = float((x * y).sum()), float((x * (1 - y)).sum())
    only_y, neither = float((y * (1 - x)).sum()), float(((1 - x) * (1 - y)).sum())
    p, q = float(x.mean()), float(y.mean())
    (p_low, p_high), (q_low, q_high) = _wilson(p, n, level), _wilson(q, n, level)
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
    import numpy as np

    n = len(x)
    if n < 2:
        return -math.inf, math.inf
    random = np.random.default_rng(seed)
    means = [x[random.integers(0, n, (size, n))].mean(axis=1) for size in _blocks(n, resamples)]
    return _tails(np.concatenate(means), n, level)


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
