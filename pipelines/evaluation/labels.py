"""Answers that are labels: F1 of each, and their plain mean, macro F1, in which a rare label counts as a frequent one.

F1 is ``2 TP / (expected + given)``; the labels are those among the expected answers, so another answer counts against
the label that was expected. Texts are equal as in `scores.label_match`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.comparison import compare
from registry.datasets import normalise
from registry.statistics import Estimate, mean_ci, resampled, reweighted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

Pair = tuple[str, str]
"""What was expected, and what was answered."""
MOST = 50
_FEWEST = 6  # rows of a label from which on its F1 has an interval, as other means have


def frequent(expected: Sequence[str], most: int) -> list[str]:
    """The most frequent labels, the most frequent first; each in its first spelling."""
    spelling: dict[str, str] = {}
    for label in expected:
        spelling.setdefault(normalise(label), label)
    counts = Counter(map(normalise, expected))
    return [spelling[label] for label in sorted(counts, key=lambda known: (-counts[known], known))[:most]]


def macro_f1(
    answers: Mapping[str, Sequence[str | None]], expected: Sequence[str], known: Collection[str] = ()
) -> dict[str, Any]:
    """The metric, compared, of the rows that have an answer; `known` are labels that there are besides.

    An interval allows for a row that was not seen, of the label of which it moves macro F1 most, mostly the rarest: one
    side answers it rightly, the other wrongly. Of labels that were not seen nothing is known, and one of them alone
    moves it by the share that a label has of all; so the interval has no lower end unless all `known` labels stand
    among the rows, or there are rows enough that a label ten times rarer than an even share does, in 99.5 % of
    evaluations: 53 a label. The upper end then leaves room for one more label.
    """

    def estimate(pairs: Sequence[Pair]) -> Estimate:
        return _macro([pairs], known)

    def difference(one: Sequence[Pair], other: Sequence[Pair]) -> Estimate:
        return macro_difference(one, other, known)

    return compare({who: _pairs(expected, given) for who, given in answers.items()}, estimate, difference)


def macro_difference(one: Sequence[Pair], other: Sequence[Pair], known: Collection[str] = ()) -> Estimate:
    """How much one side's macro F1 is above the other's, on the same rows."""
    return _macro([one, other], known)


def _macro(sides: Sequence[Sequence[Pair]], known: Collection[str]) -> Estimate:
    """The macro F1 of one side, or what it is above the second's."""
    wanted = [want for want, _ in sides[0]]
    names = frequent(wanted, len(wanted))
    kinds = Counter(zip(*sides, strict=True))  # rows alike are counted once

    def of(unseen: Sequence[tuple[str, bool]]) -> Callable[[Numbers], Numbers]:
        """The statistic, of these rows and others that the first answers rightly or not, the second the contrary."""
        each = [
            _F1(
                [*(k[side] for k in kinds), *((name, name if well is (side == 0) else "") for name, well in unseen)],
                names,
            )
            for side in range(len(sides))
        ]
        return lambda weights: _mean(each[0](weights)) - (_mean(each[1](weights)) if len(each) > 1 else 0.0)

    import numpy as np

    counts, ends = list(kinds.values()), []
    for well, worst in ((False, np.argmin), (True, np.argmax)):
        one_more = np.hstack([np.tile(np.array(counts, float), (len(names), 1)), np.eye(len(names))])
        ends.append((names[int(worst(of([(name, well) for name in names])(one_more)))], well))
    found = reweighted(of(ends), counts, higher_is_better=True)
    named = {normalise(label) for label in known}
    least = _rows_for_labels(len(named | {normalise(name) for name in names}), found.level)
    if (named and named <= {normalise(name) for name in names}) or len(wanted) >= least:
        return found
    high = (len(names) * found.high + 1) / (len(names) + 1)
    return replace(found, low=-math.inf, high=high, least_n=max(least, found.least_n or 0))


def _rows_for_labels(labels: int, level: float) -> int:
    return math.ceil(math.log((1 - level) / 10) / math.log(1 - 1 / (10 * labels)))


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
        with np.errstate(invalid="ignore"):
            found: Numbers = np.where(wanted > 0, 2 * both / (wanted + weights @ self._given), np.nan)
        return found


def _wide(estimate: Estimate, rows: int) -> Estimate:
    """Where all rows of a label are right, or all wrong, a bootstrap has no width; Wilson's interval for so many rows
    holds. Else a label of fewer than six rows has none."""
    if estimate.low >= estimate.high and estimate.estimate in (0, 1):
        wilson = mean_ci([estimate.estimate] * rows, higher_is_better=True)
        return replace(estimate, low=wilson.low, high=wilson.high)
    if rows < _FEWEST:
        return replace(estimate, low=-math.inf, high=math.inf, least_n=_FEWEST)
    return estimate


def _mean(each: Numbers) -> Numbers:
    import numpy as np

    mean: Numbers = np.nanmean(each, axis=1)
    return mean
