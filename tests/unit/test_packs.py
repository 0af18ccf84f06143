"""Which trials train in one pass, and which are drawn together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tuning.spec import packs
from pipelines.tuning.trainer import shares

TRIAL = st.fixed_dictionaries(
    {"per_device_train_batch_size": st.sampled_from([4, 8]), "gradient_accumulation_steps": st.sampled_from([1, 2])},
    optional={"use_dora": st.booleans(), "init_lora_weights": st.sampled_from([True, "pissa"])},
)


@given(st.lists(TRIAL, max_size=30), st.integers(1, 8), st.integers(1, 4))
def test_packs_hold_like_trials_and_leave_no_worker_idle(params: list[dict[str, Any]], most: int, workers: int) -> None:
    members = list(enumerate(params))
    leaders = packs(members, most=most, workers=workers)
    assert sorted(leaders) == list(range(len(params)))
    groups = [[t for t in leaders if leaders[t] == leader] for leader in sorted(set(leaders.values()))]
    for group in groups:
        assert min(group) == leaders[group[0]]
        assert len(group) <= most
        if len(group) > 1:
            assert len({(params[t]["per_device_train_batch_size"], params[t]["gradient_accumulation_steps"])
                        for t in group}) == 1  # fmt: skip
            assert not any(
                params[t].get("use_dora") or params[t].get("init_lora_weights", True) == "pissa" for t in group
            )
    assert len(groups) >= min(workers, len(params))
    assert packs(members, most=most, workers=workers) == leaders


def test_packs_are_as_large_as_they_may_be_and_all_workers_have_as_many() -> None:
    alike = [(n, {"per_device_train_batch_size": 8}) for n in range(9)]
    assert sizes(packs(alike, most=5, workers=2)) == [4, 5]
    assert sizes(packs(alike, most=4, workers=2)) == [2, 2, 2, 3]
    assert sizes(packs(alike, most=1, workers=4)) == [1] * 9
    assert set(packs(alike, most=16, workers=1).values()) == {0}


def sizes(leaders: dict[int, int]) -> list[int]:
    return sorted(Counter(leaders.values()).values())


@pytest.mark.parametrize(("most", "expected"), [(0, [1]), (1, [1]), (2, [1, 2]), (5, [1, 5]), (8, [1, 4, 8])])
def test_the_numbers_that_are_measured_divide_a_group_well(most: int, expected: list[int]) -> None:
    assert shares(most) == expected
