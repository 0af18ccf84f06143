"""Numbers of candidate, base and champion side by side: each with its interval, and every difference paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.evaluation.catalogue import METRICS
from registry.statistics import Estimate, mean_ci, paired_difference

Measured = dict[str, dict[str, list[float]]]
"""metric -> version -> one number a row"""


def means(
    measured: Mapping[str, Mapping[str, Sequence[float]]],
    chosen: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every metric's means, compared; of the `chosen` rows, or of all."""
    found = {}
    for name, versions in measured.items():
        better = not METRICS[name].lower_is_better

        def mean(values: Sequence[float], better: bool = better) -> Estimate:
            return mean_ci(values, higher_is_better=better)

        def difference(one: Sequence[float], other: Sequence[float], better: bool = better) -> Estimate:
            return paired_difference(one, other, higher_is_better=better)

        values = {
            who: list(numbers) if chosen is None else [numbers[n] for n in chosen] for who, numbers in versions.items()
        }
        found[name] = compare(values, mean, difference)
    return found


def compare(
    values: Mapping[str, Sequence[float]],
    estimate: Callable[[Sequence[float]], Estimate],
    difference: Callable[[Sequence[float], Sequence[float]], Estimate],
) -> dict[str, Any]:
    """One metric of all versions, as JSON: their own values, and the candidate's difference from the others."""
    champion = values.get("champion")
    return {
        "candidate": estimate(values["candidate"]).to_json(),
        "base": estimate(values["base"]).to_json(),
        "champion": estimate(champion).to_json() if champion is not None else None,
        "vs_base": difference(values["candidate"], values["base"]).to_json(),
        "vs_champion": difference(values["candidate"], champion).to_json() if champion is not None else None,
    }
