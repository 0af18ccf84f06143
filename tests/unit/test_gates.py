"""The policy's three values, both directions, slices, and what happens when something was not measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from registry.gates import Decision, Gate, decide
from registry.statistics import Estimate, paired_difference


def _estimate(value: float, low: float, high: float, *, n: int = 200, higher: bool = True) -> dict[str, Any]:
    return Estimate(estimate=value, low=low, high=high, n=n, higher_is_better=higher).to_json()


def _decide(gate: Gate, *, first: bool = False, **measured: Any) -> Decision:
    evaluation = {"metrics": {gate.metric: measured}, "slices": {}}
    return decide([gate], evaluation, on_underpowered="refuse", first=first)


@pytest.mark.parametrize(
    ("must", "margin", "low", "high", "expected"),
    [
        ("not_worse", 0.03, -0.02, 0.05, "pass"),
        ("not_worse", 0.03, -0.03, 0.05, "underpowered"),
        ("not_worse", 0.03, -0.09, -0.03, "fail"),
        ("better", 0.0, 0.001, 0.05, "pass"),
        ("better", 0.0, 0.0, 0.05, "underpowered"),
        ("better", 0.0, -0.05, 0.0, "fail"),
        ("better", 0.02, 0.01, 0.05, "underpowered"),
    ],
)
def test_differences_have_three_values_in_both_directions(
    must: Any, margin: float, low: float, high: float, expected: str
) -> None:
    gate = Gate(metric="m", must=must, margin=margin, against="champion")
    middle = (low + high) / 2
    assert _decide(gate, vs_champion=_estimate(middle, low, high)).decision == expected
    # The same gain as a loss that falls: mirrored, and the same decision.
    mirrored = _estimate(-middle, -high, -low, higher=False)
    assert _decide(gate, vs_champion=mirrored).decision == expected


def test_limits_use_the_interval_for_quality_and_the_figure_for_time() -> None:
    quality = Gate(metric="exact_match", must="at_least", value=0.7)
    assert _decide(quality, candidate=_estimate(0.8, 0.7, 0.9)).decision == "pass"
    assert _decide(quality, candidate=_estimate(0.72, 0.6, 0.8)).decision == "underpowered"
    assert _decide(quality, candidate=_estimate(0.5, 0.4, 0.6)).decision == "fail"
    latency = Gate(metric="p95_latency_ms", must="at_most", value=2000)
    assert _decide(latency, candidate=_estimate(1900, 1500, float("inf"), higher=False)).decision == "pass"
    assert _decide(latency, candidate=_estimate(2001, 1500, 2500, higher=False)).decision == "fail"


def test_the_first_version_is_held_against_the_base_and_a_later_one_needs_its_champion() -> None:
    gate = Gate(metric="m", must="better", against="champion")
    measured = {"vs_base": _estimate(0.1, 0.05, 0.15), "vs_champion": None}
    assert _decide(gate, first=True, **measured).decision == "pass"
    later = _decide(gate, first=False, **measured)
    assert (later.decision, later.reasons) == ("fail", ["m: was not measured against the champion"])


def test_one_failure_outweighs_doubt_and_doubt_outweighs_passes() -> None:
    clear, doubt, bad = _estimate(0.1, 0.05, 0.2), _estimate(0.0, -0.1, 0.1), _estimate(-0.2, -0.3, -0.1)
    evaluation = {"metrics": {"a": {"vs_base": clear}, "b": {"vs_base": doubt}, "c": {"vs_base": bad}}, "slices": {}}
    gates = {name: Gate(metric=name, must="better", against="base") for name in "abc"}

    def outcome(names: str) -> str:
        chosen = [gates[name] for name in names]
        return decide(chosen, evaluation, on_underpowered="ask", first=False).decision

    assert [outcome(names) for names in ("", "a", "ab", "abc", "ca")] == [
        "pass",
        "pass",
        "underpowered",
        "fail",
        "fail",
    ]
    assert "person" in decide([gates["b"]], evaluation, on_underpowered="ask", first=False).reasons[-1]


def test_slices_are_judged_by_themselves_and_empty_ones_are_named() -> None:
    evaluation = {
        "metrics": {"m": {"vs_base": _estimate(0.1, 0.05, 0.2)}},
        "slices": {"source=feedback": {"m": {"vs_base": _estimate(-0.2, -0.3, -0.1)}}},
    }
    on = [Gate(metric="m", must="better", against="base", slice=name) for name in ("source=feedback", "source=other")]
    bad, empty = (decide([gate], evaluation, on_underpowered="refuse", first=False) for gate in on)
    assert bad.decision == "fail"
    assert (empty.decision, empty.reasons) == ("pass", ["m on source=other: no rows, does not count"])
    missing = decide([Gate(metric="x", must="better")], evaluation, on_underpowered="refuse", first=False)
    assert (missing.decision, missing.reasons) == ("fail", ["x: was not measured"])


def test_too_few_rows_and_nothing_to_measure_are_told_from_a_failure() -> None:
    gate = Gate(metric="m", must="at_least", value=0.5, min_rows=300)
    small = _decide(gate, candidate=_estimate(0.9, 0.8, 1.0))
    assert (small.decision, small.reasons) == ("underpowered", ["m: was measured on 200 rows, must be on 300"])
    assert _decide(gate, candidate=_estimate(0.9, 0.8, 1.0, n=300)).decision == "pass"
    nothing = {"metrics": {}, "slices": {}, "not_applicable": {"m": "nobody serves"}}
    told = decide([gate], nothing, on_underpowered="refuse", first=False)
    assert (told.decision, told.reasons) == ("pass", ["m: nobody serves, does not count"])
    absent = {"metrics": {}, "slices": {}}
    assert decide([gate], absent, on_underpowered="refuse", first=False).decision == "fail"


def test_underpowered_names_the_rows_that_would_do() -> None:
    gate = Gate(metric="m", must="not_worse", margin=0.03, against="base")
    decision = _decide(gate, vs_base=_estimate(0.0, -0.05, 0.05, n=200))
    # deviation 0.05 / 1.96 * sqrt(200) = 0.361; ((1.96 + 0.8416) * 0.361 / 0.03)^2 = 1135.2
    assert "about 1136 would do (80 % power), there are 200" in decision.reasons[0]


@pytest.mark.parametrize("rate", [0.9, 0.5, 0.1])
def test_a_candidate_worse_by_the_margin_passes_no_more_often_than_promised(rate: float) -> None:
    """400 simulated evaluations of 120 rows each: at most alpha/2 = 2.5 % may pass (binomial 99.9 % bound)."""
    gate, random, runs, n, margin = (
        Gate(metric="m", must="not_worse", margin=0.05),
        np.random.default_rng(3),
        400,
        120,
        0.05,
    )
    passed = 0
    for _ in range(runs):
        luck = random.random(n)
        base, candidate = (luck < rate).astype(float), (luck < rate - margin).astype(float)
        flipped = random.random(n) < 0.1  # rows on which the two have nothing in common
        candidate[flipped] = random.random(int(flipped.sum())) < rate - margin
        measured = paired_difference(candidate, base, higher_is_better=True).to_json()
        passed += _decide(gate, vs_base=measured).decision == "pass"
    assert passed <= stats.binom.ppf(0.999, runs, 0.025)


def test_what_is_unavailable_or_doubted_never_passes() -> None:
    gate = Gate(metric="m", must="at_least", value=0.5, slice="source=feedback")
    measured = {"m": {"candidate": _estimate(0.9, 0.8, 1.0)}}
    for what in ("unavailable", "doubted"):
        found = {"metrics": measured, "slices": {}, what: {"m": "no judge is named"}}
        told = decide([gate], found, on_underpowered="refuse", first=False)
        assert (told.decision, told.reasons) == (
            "fail",
            [f"m on source=feedback: is {what}, no judge is named"],
        )
