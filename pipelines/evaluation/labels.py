"""Answers that are labels: F1 of each, and their plain mean, macro F1, in which a rare label counts as a frequent one.

F1 is ``2 TP / (expected + given)``; the labels are those among the expected answers, so another answer counts against
the label that was expected. Texts are equal as in `scores.label_match`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.comparison import compare
from registry.datasets import normalise
from registry.statistics import Estimate, mean_ci, paired_difference, resampled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

Pair = tuple[str, str]
"""What was expected, and what was answered."""
MOST = 50


def frequent(expected: Sequence[str], most: int) -> list[str]:
    """The most frequent labels, the most frequent first; each in its first spelling."""
    spelling: dict[str, str] = {}
    for label in expected:
        spelling.setdefault(normalise(label), label)
    counts = Counter(map(normalise, expected))
    return [spelling[label] for label in sorted(counts, key=lambda known: (-counts[known], known))[:most]]


def macro_f1(answers: Mapping[str, Sequence[str | None]], expected: Sequence[str]) -> dict[str, Any]:
    """The metric, compared, of the rows that have an answer."""

    def estimate(pairs: Sequence[Pair]) -> Estimate:
        each = _F1(pairs)
        found = resampled(lambda weights: _mean(each(weights)), len(pairs), higher_is_better=True)[0]
        return _wide(found, len(pairs))

    def difference(one: Sequence[Pair], other: Sequence[Pair]) -> Estimate:
        ours, theirs = _F1(one), _F1(other)
        found = resampled(
            lambda weights: _mean(ours(weights)) - _mean(theirs(weights)), len(one), higher_is_better=True
        )[0]
        if found.low < found.high:
            return found
        # As `_wide`: where both are always right, how often they are leaves room for a difference
        right = [[float(normalise(label) == normalise(answer)) for label, answer in pairs] for pairs in (one, other)]
        rows = paired_difference(*right, higher_is_better=True)
        return replace(found, low=min(found.low, rows.low), high=max(found.high, rows.high))

    return compare({who: _pairs(expected, given) for who, given in answers.items()}, estimate, difference)


def by_label(answers: Mapping[str, Sequence[str | None]], expected: Sequence[str]) -> list[dict[str, Any]]:
    """F1 of the most frequent labels, as JSON: ``{"label", "rows", and by version an estimate}``; null of a label that
    no row with an answer expects."""
    names = frequent(expected, MOST)
    counts = Counter(map(normalise, expected))
    lines: list[dict[str, Any]] = [{"label": name, "rows": counts[normalise(name)]} for name in names]
    for who, given in answers.items():
        pairs = [pair for pair in _pairs(expected, given) if pair is not None]
        answered = Counter(normalise(label) for label, _ in pairs)
        for line, estimate in zip(lines, resampled(_F1(pairs, names), len(pairs), higher_is_better=True), strict=True):
            rows = answered[normalise(line["label"])]
            line[who] = _wide(estimate, rows).to_json() if rows else None
    return lines


def _pairs(expected: Sequence[str], given: Sequence[str | None]) -> list[Pair | None]:
    return [None if answer is None else (label, answer) for label, answer in zip(expected, given, strict=True)]


class _F1:
    """How often each row counts, [draws, rows], to each label's F1, [draws, labels]; NaN for a label that no row of
    the draw expects."""

    def __init__(self, pairs: Sequence[Pair], labels: Sequence[str] | None = None) -> None:
        import numpy as np

        wanted, given = ([normalise(pair[side]) for pair in pairs] for side in (0, 1))
        number = {normalise(name): n for n, name in enumerate(labels or frequent(wanted, len(wanted)))}
        self._wanted, self._given = np.zeros((2, len(pairs), len(number)))
        for row, (one, other) in enumerate(zip(wanted, given, strict=True)):
            for table, label in ((self._wanted, one), (self._given, other)):
                if label in number:
                    table[row, number[label]] = 1

    def __call__(self, weights: Numbers) -> Numbers:
        import numpy as np

        wanted, both = weights @ self._wanted, weights @ (self._wanted * self._given)
        found: Numbers = np.where(wanted > 0, 2 * both / np.maximum(wanted + weights @ self._given, 1), np.nan)
        return found


def _wide(estimate: Estimate, rows: int) -> Estimate:
    """Where all rows are right, or all wrong, a bootstrap has no width; Wilson's interval for so many rows holds."""
    if estimate.low < estimate.high or estimate.estimate not in (0, 1):
        return estimate
    wilson = mean_ci([estimate.estimate] * rows, higher_is_better=True)
    return replace(estimate, low=wilson.low, high=wilson.high)


def _mean(each: Numbers) -> Numbers:
    import numpy as np

    mean: Numbers = np.nanmean(each, axis=1, keepdims=True)
    return mean
