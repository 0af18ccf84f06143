"""Prices by token and by machine, and what is not a price."""

from __future__ import annotations

import pytest

from infra.errors import UsageError
from registry.pricing import MachinePrice, break_even_per_day, cost_usd


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


def test_a_machine_pays_from_the_volume_at_which_its_day_costs_what_the_hosted_requests_cost() -> None:
    machine = MachinePrice(per_machine_hour_usd=0.5)
    volume = break_even_per_day(machine, 0.001, capacity_per_day=20_000)
    assert volume == pytest.approx(12_000)
    assert volume * 0.001 == pytest.approx(24 * 0.5)
    assert break_even_per_day(machine, 0.001, capacity_per_day=12_000) == pytest.approx(12_000)
    assert break_even_per_day(machine, 0.001, capacity_per_day=11_999) is None
    assert break_even_per_day(machine, 0.0, capacity_per_day=1e9) is None
