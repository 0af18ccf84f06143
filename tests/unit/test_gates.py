"""The policy's three values, both directions, slices, and what happens when something was not measured."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from registry.gates import Decision, Gate, decide
from registry.statistics import Estimate, percentile_difference
from tests.benchmarks.gates import CASES, Case, least_passes, most_equal, most_passes, passes


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
    assert later.decision == "fail"
    assert later.reasons[0].startswith("m: was not measured against the champion, which has no such number where")


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
    misspelt = Gate(metric="m", must="better", against="base", slice="label=refnud")
    doubtful = decide([misspelt], evaluation, on_underpowered="refuse", first=False)
    assert (doubtful.decision, doubtful.reasons) == (
        "underpowered",
        ["m on label=refnud: there are no such rows; is the slice spelt as the rows have it?"],
    )
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


def test_contamination_is_judged_whatever_the_policy_and_names_rows() -> None:
    leak = {"row": "train.jsonl:7", "stands_in": "test.jsonl:2", "how": "nearly"}
    found = {"metrics": {}, "slices": {}, "contamination": {"rows": 3, "of": 90, "examples": [leak]}}
    told = decide([], found, on_underpowered="refuse", first=True)
    assert told.decision == "fail"
    assert told.gates[0]["examples"] == [leak]
    assert told.reasons == [
        "contamination: 3 of 90 rows to learn from also stood in rows that judge, at most 0 may: "
        "train.jsonl:7 nearly in test.jsonl:2, and 2 more. Take them out, or allow them with the gate "
        "{metric: contamination, must: at_most, value: 3}"
    ]
    for value, decision in ((2, "fail"), (3, "pass")):
        own = Gate(metric="contamination", must="at_most", value=value)
        allowed = decide([own], found, on_underpowered="refuse", first=True)
        assert (allowed.decision, len(allowed.gates)) == (decision, 1)
    clean = found | {"contamination": {"rows": 0, "of": 90, "examples": []}}
    assert decide([], clean, on_underpowered="refuse", first=True).gates[0]["decision"] == "pass"


def test_a_required_suite_must_have_run_and_measured_something() -> None:
    found = {
        "metrics": {"loss": {}},
        "slices": {},
        "suites": ["quality", "privacy"],
        "not_applicable": {"leaks": "no secrets"},
        "unavailable": {"judged": "no judge is named"},
    }
    for suite, metrics, decision, reason in (
        ("quality", ["loss", "chrf"], "pass", "suite quality: ran, as required"),
        ("privacy", ["leaks"], "fail", "suite privacy: is required and measured nothing: no secrets"),
        ("safety", ["refusals"], "fail", "suite safety: is required and did not run"),
        ("quality", ["judged"], "fail", "suite quality: is required and measured nothing: no judge is named"),
    ):
        told = decide([], found, on_underpowered="refuse", first=True, required={suite: metrics})
        assert (told.decision, told.reasons) == (decision, [reason])
    doubted = decide(
        [],
        found | {"doubted": {"loss": "kappa 0.1"}},
        on_underpowered="refuse",
        first=True,
        required={"quality": ["loss"]},
    )
    assert doubted.reasons == ["suite quality: is required and not to be trusted: kappa 0.1"]


def test_rows_are_asked_of_a_slice_too() -> None:
    gate = Gate(metric="m", must="better", against="base", slice="source=feedback", min_rows=50)
    for rows, decision in ((49, "underpowered"), (50, "pass")):
        part = {"candidate": _estimate(1, 0, 2, n=rows), "vs_base": _estimate(0.1, 0.05, 0.2, n=rows)}
        found = {"metrics": {"m": {"candidate": _estimate(1, 0, 2, n=900)}}, "slices": {"source=feedback": {"m": part}}}
        assert decide([gate], found, on_underpowered="refuse", first=False).decision == decision
    none = decide([gate], {"metrics": {}, "slices": {}}, on_underpowered="refuse", first=False)
    assert (none.decision, none.reasons) == (
        "underpowered",
        ["m on source=feedback: was measured on 0 rows, must be on 50"],
    )


def test_underpowered_names_the_rows_that_would_do_and_what_these_show() -> None:
    gate = Gate(metric="m", must="not_worse", margin=0.03, against="base")
    decision = _decide(gate, vs_base=_estimate(0.0, -0.05, 0.05, n=200))
    # deviation 0.05 / 1.96 * sqrt(200) = 0.361; ((1.96 + 0.8416) * 0.361 / 0.03)^2 = 1135.2
    assert "about 1136 would do (80 % power), there are 200, which show 0.0715" in decision.reasons[0]
    entry = decision.gates[0]
    assert entry["power"] == pytest.approx(stats.norm.cdf(0.03 / 0.05 * 1.95996 - 1.95996), abs=1e-5)
    # A longer bad side needs more rows, and is less often cleared
    skewed = _decide(gate, vs_base=_estimate(0.0, -0.07, 0.04, n=200))
    assert skewed.gates[0]["power"] < entry["power"]
    assert skewed.gates[0]["detectable"] > entry["detectable"]


@pytest.mark.parametrize("case", [*CASES[:3], CASES[4], *CASES[6:9], *CASES[11:]], ids=lambda case: case.name)
def test_worse_by_the_margin_passes_no_more_often_than_promised_and_equal_as_often_as_told(case: Case) -> None:
    """1,000 simulated evaluations each, as `make bench` has them on more numbers of rows."""
    for rows in case.refused:
        assert passes(case, rows, worse=case.margin, runs=20).refused == 20
    rows = case.rows[0]
    assert passes(case, rows, worse=case.margin).passed <= most_passes()
    equal = passes(case, rows, worse=0.0)
    assert least_passes(equal.told) <= equal.passed <= most_equal(equal.told)


def test_the_bound_of_told_power_would_catch_none_told() -> None:
    assert most_equal(0.0) < 150 < least_passes(0.25)


def test_too_few_rows_for_an_interval_say_how_many_would_do() -> None:
    gate = Gate(metric="p95_latency_ms", must="not_worse", margin=50, against="champion")
    compared = percentile_difference([1.0] * 24, [1.0] * 24, 0.95, higher_is_better=False)
    told = _decide(gate, vs_champion=compared.to_json())
    assert (told.decision, told.gates[0]["power"]) == ("underpowered", None)
    assert "too few rows, there is no interval on fewer than 72, there are 24" in told.reasons[0]


def test_rows_that_are_asked_for_are_those_of_the_comparison() -> None:
    """A champion that answered few rows is compared on few, however many the candidate answered."""
    gate = Gate(metric="m", must="not_worse", margin=0.1, against="champion", min_rows=50)
    for rows, decision in ((49, "underpowered"), (50, "pass")):
        few = _decide(gate, candidate=_estimate(1, 0, 2, n=900), vs_champion=_estimate(0, -0.05, 0.05, n=rows))
        assert few.decision == decision
        if rows == 49:
            assert few.reasons == ["m against champion: was compared on 49 rows, must be on 50"]
    own = Gate(metric="m", must="at_least", value=0, min_rows=50)
    assert _decide(own, candidate=_estimate(1, 0, 2, n=49)).decision == "underpowered"


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
