"""Prices by token and by machine, and what is not a price."""

from __future__ import annotations

import pytest

from infra.errors import UsageError
from registry.pricing import cost_usd


def test_costs_follow_the_price_that_is_given() -> None:
    tokens = {"per_1k_prompt_tokens_usd": 0.5, "per_1k_completion_tokens_usd": 1.5}
    assert cost_usd(2000, 100, 9.0, tokens) == pytest.approx(1.15)
    assert cost_usd(2000, 100, 36.0, {"per_machine_hour_usd": 0.1}) == pytest.approx(0.001)


@pytest.mark.parametrize(
    "price",
    [
        {},
        {"per_machine_hour_usd": -1},
        {"per_machine_hour_usd": float("nan")},
        {"per_1k_prompt_tokens_usd": 1},
        {"per_machine_hour_usd": 1, "per_1k_prompt_tokens_usd": 1, "per_1k_completion_tokens_usd": 1},
    ],
)
def test_what_is_not_a_price_says_what_one_is(price: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="per_machine_hour_usd"):
        cost_usd(1, 1, 1.0, price)
