"""Distances between two histograms over the same bins, and how large chance alone makes them.

Each function takes counts along the last axis, so that thousands of resampled pairs are compared in one call.
numpy is imported when a function is called: the pages that only read stored verdicts do not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Statistic = Literal["ks", "js", "difference"]


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


def noise(
    a: Array, b: Array, distance: Callable[[Array, Array], Array], *, tail: float, resamples: int, seed: int
) -> float:
    """What `distance` exceeds with probability `tail` when nothing has moved.

    Both sides are drawn anew from their pooled shares, each at its own size: the reference is as finite as the
    traffic, and its noise counts too (the parametric bootstrap of the two-sample problem; Efron and Tibshirani
    1993, section 16.2).
    """
    import numpy as np

    random = np.random.default_rng(seed)
    pooled = _shares(a + b)
    drawn = distance(
        random.multinomial(int(a.sum()), pooled, resamples).astype(float),
        random.multinomial(int(b.sum()), pooled, resamples).astype(float),
    )
    return float(np.quantile(drawn, 1 - tail, method="higher"))


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
