"""Parts of the test rows that are also looked at by themselves: by source, label, language of the question, and length.

A slice is named as gates name it, such as ``label=refund``.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipelines.evaluation import labels, scores
from pipelines.evaluation.catalogue import LENGTHS
from pipelines.evaluation.comparison import Measured, means
from registry import languages
from registry.datasets import Row, normalise

_LABELS, _LANGUAGES = 8, 6  # the most frequent ones
_EDGES = (50, 200, 1000)


def measure(
    rows: Sequence[Row], measured: Measured, whole: Mapping[str, Any], wanted: Iterable[str | None] = ()
) -> dict[str, Any]:
    """The metrics that have a number a test row, of each slice; `whole` has them of all rows. Of labels and languages
    the most frequent have a slice, and those that are `wanted` by name."""
    found = {}
    for name, chosen in parts(rows, set(wanted)).items():
        if len(chosen) == len(rows):
            found[name] = {metric: whole[metric] for metric in measured if metric in whole}
        else:
            found[name] = means(measured, chosen)
    return found


def parts(rows: Sequence[Row], wanted: Iterable[str | None] = ()) -> dict[str, list[int]]:
    """The numbers of each slice's rows."""
    found = _by("source", rows, lambda row: row.source)
    if scores.are_labels([row.answer for row in rows]):
        spelling = {normalise(label): label for label in labels.frequent([row.answer for row in rows], len(rows))}
        found |= _by("label", rows, lambda row: spelling[normalise(row.answer)], _LABELS, wanted)
    found |= _by("language", rows, lambda row: languages.guess(row.prompt[-1]["content"]), _LANGUAGES, wanted)
    lengths = _by("length", rows, lambda row: LENGTHS[bisect(_EDGES, len(row.prompt[-1]["content"]))])
    return found | {name: lengths[name] for length in LENGTHS if (name := f"length={length}") in lengths}


def _by(
    kind: str, rows: Sequence[Row], of: Callable[[Row], str], most: int | None = None, wanted: Iterable[str | None] = ()
) -> dict[str, list[int]]:
    values = [of(row) for row in rows]
    named = {value: f"{kind}={value}" for value in dict.fromkeys(values)}
    kept = {value for value, _ in Counter(values).most_common(most)} | {
        v for v, name in named.items() if name in wanted
    }
    return {name: [n for n, v in enumerate(values) if v == value] for value, name in named.items() if value in kept}
