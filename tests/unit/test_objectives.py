"""The Pareto set by its definition, and the rule that picks, against the slow and obvious way to do both."""

from __future__ import annotations

import math
import random

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import TunesmithError
from pipelines.tuning.objectives import MEASURES, Rule, measures, pareto, pick

NAMES = ["loss", "adapter_parameters", "training_tokens"]
# Few values, so that rows are often equal in some objective, or in all
ROWS = st.lists(st.fixed_dictionaries({name: st.integers(0, 5).map(float) for name in NAMES}), min_size=1, max_size=25)


def dominates(one: dict[str, float], other: dict[str, float], names: list[str]) -> bool:
    return all(one[n] <= other[n] for n in names) and any(one[n] < other[n] for n in names)


@given(ROWS, st.integers(1, 3))
def test_nobody_in_the_pareto_set_is_dominated_and_everybody_outside_is(
    rows: list[dict[str, float]], count: int
) -> None:
    names = NAMES[:count]
    front = pareto(rows, names)
    assert front == sorted(set(front))
    for number, row in enumerate(rows):
        assert (number in front) == (not any(dominates(other, row, names) for other in rows))
    assert all(any(dominates(rows[f], row, names) for f in front) for n, row in enumerate(rows) if n not in front)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_pareto_set_and_what_is_picked_do_not_hang_on_the_order(
    rows: list[dict[str, float]], draw: random.Random
) -> None:
    shuffled = list(range(len(rows)))
    draw.shuffle(shuffled)
    again = pareto([rows[n] for n in shuffled], NAMES)
    assert sorted(shuffled[n] for n in again) == pareto(rows, NAMES)
    rule = Rule(within=0.5, then="adapter_parameters")
    assert rows[shuffled[pick([rows[n] for n in shuffled], NAMES, rule)]] == rows[pick(rows, NAMES, rule)]


@given(ROWS)
def test_the_pareto_set_is_optunas(rows: list[dict[str, float]]) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * len(NAMES))
    study.add_trials([optuna.trial.create_trial(values=[row[name] for name in NAMES]) for row in rows])
    assert pareto(rows, NAMES) == [trial.number for trial in study.best_trials]


@given(ROWS, st.sampled_from([0.0, 0.02, 0.5, 1.0]), st.integers(0, 5))
def test_the_rule_finds_the_least_of_all_that_are_near_enough(
    rows: list[dict[str, float]], within: float, most: int
) -> None:
    limits = {"training_tokens": float(most)}
    allowed = [row for row in rows if row["training_tokens"] <= most]
    if not allowed:
        with pytest.raises(TunesmithError, match="training_tokens must be at most"):
            pick(rows, NAMES, None, limits)
        return
    won = pick(rows, NAMES, Rule(within=within, then="adapter_parameters"), limits)
    best = min(row["loss"] for row in allowed)
    near = [row for row in allowed if row["loss"] <= best * (1 + within)]
    assert rows[won] in near
    assert rows[won]["adapter_parameters"] == min(row["adapter_parameters"] for row in near)
    assert not any(dominates(row, rows[won], NAMES) for row in allowed)


def test_one_objective_is_the_lowest_loss_and_the_first_of_equals() -> None:
    rows = [{"loss": loss} for loss in (1.5, math.nan, 1.25, 1.25, math.inf)]
    assert pick(rows, ["loss"]) == 2
    assert pareto(rows, ["loss"]) == [2, 3]


def test_the_rule_takes_a_smaller_adapter_for_two_percent_and_not_for_more() -> None:
    rows = [
        {"loss": 1.000, "adapter_parameters": 8e6},
        {"loss": 1.019, "adapter_parameters": 2e6},
        {"loss": 1.021, "adapter_parameters": 1e6},
    ]
    names = ["loss", "adapter_parameters"]
    assert pareto(rows, names) == [0, 1, 2]
    assert pick(rows, names) == 0
    assert pick(rows, names, Rule(within=0.02, then="adapter_parameters")) == 1
    assert pick(rows, names, None, {"adapter_parameters": 1e6}) == 2
    # What the rule is measured from keeps the constraints too
    assert pick(rows, names, Rule(within=0.02, then="adapter_parameters"), {"adapter_parameters": 5e6}) == 2


def test_what_the_rule_leaves_equal_is_decided_by_the_objectives_in_order_and_then_by_the_rows() -> None:
    rows = [
        {"loss": 1.02, "adapter_parameters": 2.0, "training_tokens": 5.0},
        {"loss": 1.01, "adapter_parameters": 2.0, "training_tokens": 9.0},
        {"loss": 1.01, "adapter_parameters": 2.0, "training_tokens": 9.0},
        {"loss": 1.00, "adapter_parameters": 3.0, "training_tokens": 9.0},
    ]
    assert pareto(rows, NAMES) == [0, 1, 2, 3]
    assert pick(rows, NAMES, Rule(within=0.05, then="adapter_parameters")) == 1


def test_constraints_that_nobody_keeps_are_named_with_what_there_was() -> None:
    rows = [{"loss": 1.0, "adapter_parameters": 9e6}, {"loss": 3.0, "adapter_parameters": 1e6}]
    with pytest.raises(TunesmithError) as error:
        pick(rows, ["loss"], None, {"adapter_parameters": 5e5, "loss": 2})
    assert error.value.message == (
        "No trial keeps the constraints: adapter_parameters must be at most 500,000, and the least was 1,000,000."
    )
    with pytest.raises(TunesmithError, match="all constraints at once"):
        pick(rows, ["loss"], None, {"adapter_parameters": 5e6, "loss": 2})


def test_a_row_has_every_measure() -> None:
    row = measures(loss=1.2, adapter_parameters=1000, training_seconds=3.0, training_tokens=1500)
    assert list(row) == list(MEASURES)
    assert row["step_ms_per_token"] == pytest.approx(2.0)
