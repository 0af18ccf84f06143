from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UsageError
from pipelines.data.split import LEAST, assign, require

sizes = st.dictionaries(st.text(alphabet="abcdefgh", min_size=1, max_size=6), st.integers(1, 9), min_size=20)


@given(sizes, st.integers(0, 3))
def test_every_group_has_one_place_that_its_name_decides(sizes: dict[str, int], seed: int) -> None:
    places = assign(sizes, validation=0.1, test=0.1, seed=seed)
    assert set(places) == set(sizes)
    assert places == assign(dict(reversed(sizes.items())), validation=0.1, test=0.1, seed=seed)
    rows = {split: sum(sizes[g] for g in sizes if places[g] == split) for split in LEAST}
    assert rows["test"] >= LEAST["test"]
    assert rows["validation"] >= LEAST["validation"]


def test_more_rows_leave_the_others_in_place() -> None:
    few = {f"group {n}": 1 for n in range(1000)}
    before, after = (
        assign(s, validation=0.1, test=0.1, seed=0) for s in (few, few | {f"new {n}": 1 for n in range(500)})
    )
    assert all(after[group] == before[group] for group in few)
    assert 70 <= sum(place == "test" for place in before.values()) <= 130


def test_a_group_that_would_be_the_split_stays_in_train() -> None:
    groups = {f"g{n}": 1 for n in range(300)} | {f"big{n}": 200 for n in range(20)}
    places = assign(groups, validation=0.1, test=0.1, seed=0)
    assert {places[f"big{n}"] for n in range(20)} == {"train"}


def test_too_few_rows_is_a_sentence() -> None:
    with pytest.raises(UsageError, match="leave 8 train, 1 validation, 9 test, and validation needs at least 2"):
        require({"train": 8, "validation": 1, "test": 9}, "cleaning")
