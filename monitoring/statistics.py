"""Distances between two histograms over the same bins, and how large chance alone makes them.

Each function takes counts along the last axis, so that thousands of resampled pairs are compared in one call.
numpy is imported when a function is called: the pages that only read stored verdicts do not pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from registry.profile import Feature

    Array = NDArray[np.float64]
    Distance = Callable[[Array, Array], Array]

Statistic = Literal["ks", "js", "difference"]
_FULL, _PAIRS = 10, 8  # requests of a column, and pairs of them, from which on bursts are looked for
_SIDE = 20  # requests on either side of a change, at least
_BY_CHANCE = 0.01
_BLOCK = 20  # resamples at once, so that they stay small


def of(feature: Feature, bins: Sequence[int]) -> tuple[Statistic, Distance]:
    """The statistic that a feature is compared by, on some of its bins: the Jensen-Shannon distance of categories, the
    difference of the means of flags and of what people say, else Kolmogorov and Smirnov's."""
    if feature.kind == "category":
        return "js", js
    if feature.kind == "flag" or feature.side == "quality":
        return "difference", partial(
            mean_difference, centres=tuple(feature.centres[i] for i in bins), worse=feature.worse
        )
    return "ks", partial(ks, worse=feature.worse)


def ks(a: Array, b: Array, worse: Literal["up", "down"] | None = None) -> Array:
    """Kolmogorov and Smirnov: the largest difference of the cumulative shares, 0 to 1. From histograms it is the
    exact statistic of the binned values, and at most the raw values' own. With `worse`, only where b has moved up
    (down) against a, the one-sided statistic."""
    gap = _shares(a).cumsum(-1) - _shares(b).cumsum(-1)
    if worse == "up":
        result: Array = gap.max(-1)
    elif worse == "down":
        result = (-gap).max(-1)
    else:
        result = abs(gap).max(-1)
    return result


def js(a: Array, b: Array) -> Array:
    """Jensen-Shannon distance, base 2 (Lin 1991; the root of the divergence), 0 to 1."""
    import numpy as np

    p, q = _shares(a), _shares(b)
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(p > 0, p * np.log2(p / middle), 0.0).sum(-1)
        right = np.where(q > 0, q * np.log2(q / middle), 0.0).sum(-1)
    result: Array = np.sqrt(np.maximum(0.0, (left + right) / 2))
    return result


def mean_difference(a: Array, b: Array, centres: tuple[float, ...], worse: Literal["up", "down"] | None) -> Array:
    """How far b's mean lies from a's, in the feature's unit; with `worse`, in that direction (else negative)."""
    import numpy as np

    gap: Array = (_shares(b) - _shares(a)) @ np.asarray(centres)
    return gap if worse == "up" else -gap if worse == "down" else abs(gap)


def psi(a: Array, b: Array) -> Array:
    """The population stability index, ``sum((q - p) ln(q / p))``, with an empty bin's share taken as 0.0001, as
    Evidently does. It grows with the number of bins and says nothing of chance: folklore calls 0.1 slight and 0.25 a
    shift."""
    import numpy as np

    p, q = (np.where(s == 0, 1e-4, s) for s in (_shares(a), _shares(b)))
    result: Array = ((q - p) * np.log(q / p)).sum(-1)
    return result


def wasserstein(a: Array, b: Array, centres: Sequence[float]) -> Array:
    """The first Wasserstein distance in the feature's unit, with all of a bin taken to lie at its centre: off from that
    of the raw values by the mean distance of values from their bins' centres at most, on both sides together."""
    import numpy as np

    result: Array = abs(_shares(a).cumsum(-1) - _shares(b).cumsum(-1))[..., :-1] @ np.diff(np.asarray(centres))
    return result


def chi_square_p(a: Array, b: Array) -> float:
    """The p-value of Pearson's chi-square test of whether two samples' categories are alike (without correction)."""
    from scipy.special import chdtrc

    both = (a + b) > 0
    n, m = float(a.sum()), float(b.sum())
    x, y = a[both], b[both]
    statistic = float((((m / n) ** 0.5 * x - (n / m) ** 0.5 * y) ** 2 / (x + y)).sum())
    return float(chdtrc(max(1, int(both.sum()) - 1), statistic))


def design_effect(columns: Array) -> float:
    """By how much requests that come in bursts of one kind make a histogram of them more uncertain than as many
    independent ones would be: at least 1. `columns` are histograms of one time after the other, (columns, bins).

    Pearson's X2 of each two neighbours, over its degrees of freedom, both summed: what varies slowly, such as a rhythm
    of the day, cancels out. (Rao and Scott 1981 divide sample sizes by such an effect.) 1 where too few requests tell.
    """
    import numpy as np

    full = columns[columns.sum(-1) >= _FULL]
    if len(full) < _PAIRS + 1:
        return 1.0
    x, y = full[:-1], full[1:]
    n, m, both = x.sum(-1, keepdims=True), y.sum(-1, keepdims=True), x + y
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = np.where(both > 0, (np.sqrt(m / n) * x - np.sqrt(n / m) * y) ** 2 / both, 0.0).sum()
    freedom = ((both > 0).sum(-1) - 1).sum()
    return max(1.0, float(squares / freedom)) if freedom else 1.0


def noise(
    a: Array, b: Array, distance: Distance, *, tail: float, resamples: int, seed: int, effect: float = 1.0
) -> float:
    """What `distance` exceeds with probability `tail` when nothing has moved; `effect` is b's `design_effect`, by which
    its size is divided; who compares with a likewise bursty a divides its counts themselves.

    Both sides are drawn anew from their pooled shares, each at its own size: the reference is as finite as the
    traffic, and its noise counts too (the parametric bootstrap of the two-sample problem; Efron and Tibshirani
    1993, section 16.2).
    """
    import numpy as np

    random = np.random.default_rng(seed)
    pooled = _shares(a + b / effect)
    drawn = distance(
        random.multinomial(max(1, int(a.sum())), pooled, resamples).astype(float),
        random.multinomial(max(1, int(b.sum() / effect)), pooled, resamples).astype(float),
    )
    return float(np.quantile(drawn, 1 - tail, method="higher"))


def noise_at_most(name: Statistic, n: float, m: float, *, bins: int, span: float, tail: float) -> float:
    """A bound on `noise` that costs nothing: where it is below what matters, nothing needs to be drawn.

    Of the Kolmogorov-Smirnov distance by Dvoretzky, Kiefer and Wolfowitz (Wei and Dudley 2012, for two samples), of a
    difference of means over a `span` of values by Hoeffding (1963), of the Jensen-Shannon distance by the chi-square
    distribution that n m / (n + m) times it tends to, half as much again.
    """
    scale = 1 / n + 1 / m
    if name == "js":
        from scipy.special import chdtri

        return math.sqrt(1.5 * float(chdtri(max(1, bins - 1), tail)) / (8 * math.log(2)) * scale)
    bound = math.sqrt(math.log(2 / tail) / 2 * scale)
    return span * bound if name == "difference" else bound


def change_point(columns: Array, distance: Distance, *, resamples: int = 200, seed: int = 0) -> int | None:
    """Which of some histograms in their order, (columns, bins), is the first after a change; None without one.

    The split at which the distance of the two sides, times the root of n m / (n + m), is largest (the maximally
    selected two-sample statistic; Csörgö and Horváth 1997, Limit Theorems in Change-Point Analysis). It is a change
    where columns of the same sizes, drawn from all of them pooled, reach that in one of a hundred at most. Requests are
    taken to be independent; where they come in bursts of one kind, chance does it more often.
    """
    import numpy as np

    if len(columns) < 2 or not columns.sum():
        return None

    def weighed(counts: Array) -> Array:
        before = counts.cumsum(-2)
        before, after = before[..., :-1, :], before[..., -1:, :] - before[..., :-1, :]
        n, m = before.sum(-1), after.sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = distance(before, after) * np.sqrt(n * m / (n + m))
        result: Array = np.where((n >= _SIDE) & (m >= _SIDE), found, 0.0)
        return result

    found, random = weighed(columns), np.random.default_rng(seed)
    sizes, pooled = columns.sum(-1).astype(int), _shares(columns.sum(0))
    drawn = [
        weighed(random.multinomial(sizes, pooled, (_BLOCK, len(columns))).astype(float)).max(-1)
        for _ in range(-(-resamples // _BLOCK))
    ]
    chance = np.quantile(np.concatenate(drawn), 1 - _BY_CHANCE, method="higher")
    return int(found.argmax()) + 1 if found.max() > chance else None


def array(counts: Any) -> Array:
    """Counts as floats."""
    import numpy as np

    return np.asarray(counts, dtype=np.float64)


def dense(counts: Mapping[str, int] | None, bins: int) -> list[int]:
    """A histogram with all its bins from one that names only those that hold something."""
    counts = counts or {}
    return [int(counts.get(str(i), 0)) for i in range(bins)]


def _shares(counts: Array) -> Array:
    result: Array = counts / counts.sum(-1, keepdims=True)
    return result
