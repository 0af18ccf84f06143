"""Numbers of candidate, base and champion side by side: each with its interval, and every difference paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipelines.evaluation.catalogue import METRICS, Metric
from registry.statistics import Estimate, mean_ci, paired_difference

Value = TypeVar("Value")
Measured = dict[str, dict[str, Sequence[float | None]]]
"""metric -> version -> one number a row, None where there is none"""


def means(
    measured: Mapping[str, Mapping[str, Sequence[float | None]]],
    chosen: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every metric's means, compared; of the `chosen` rows, or of all. Without those of which the candidate has no
    number there."""
    found = {}
    for name, versions in measured.items():
        metric = METRICS[name]

        def mean(values: Sequence[float], metric: Metric = metric) -> Estimate:
            return mean_ci(values, higher_is_better=not metric.lower_is_better, bounds=metric.bounds)

        def difference(one: Sequence[float], other: Sequence[float], metric: Metric = metric) -> Estimate:
            return paired_difference(one, other, higher_is_better=not metric.lower_is_better, bounds=metric.bounds)

        values = {
            who: list(numbers) if chosen is None else [numbers[n] for n in chosen] for who, numbers in versions.items()
        }
        if any(value is not None for value in values.get("candidate", ())):
            found[name] = compare(values, mean, difference)
    return found


def compare(
    values: Mapping[str, Sequence[Value | None]],
    estimate: Callable[[Sequence[Value]], Estimate],
    difference: Callable[[Sequence[Value], Sequence[Value]], Estimate],
) -> dict[str, Any]:
    """One metric of all versions, as JSON: their own values, and the candidate's difference from the others on the rows
    on which both have one. A value is what a row has to say to the metric, mostly a number. The hosted model has its
    two only where it was measured."""

    def own(who: str) -> dict[str, Any] | None:
        given = [value for value in values.get(who, ()) if value is not None]
        return estimate(given).to_json() if given else None

    def beside(who: str) -> dict[str, Any] | None:
        pairs = zip(values["candidate"], values[who], strict=True) if {"candidate", who} <= values.keys() else ()
        both = [(one, other) for one, other in pairs if one is not None and other is not None]
        return difference([one for one, _ in both], [other for _, other in both]).to_json() if both else None

    hosted = {"hosted": own("hosted"), "vs_hosted": beside("hosted")} if "hosted" in values else {}
    return {
        "candidate": own("candidate"),
        "base": own("base"),
        "champion": own("champion"),
        "vs_base": beside("base"),
        "vs_champion": beside("champion"),
        **hosted,
    }
