"""What a request costs, by tokens or by the machine's time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from infra.errors import UsageError

Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TokenPrice(BaseModel):
    """A hosted model's price list."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_1k_prompt_tokens_usd: Usd
    per_1k_completion_tokens_usd: Usd

    def cost_usd(self, prompt_tokens: int, completion_tokens: int, engine_seconds: float) -> float:
        return (
            prompt_tokens * self.per_1k_prompt_tokens_usd + completion_tokens * self.per_1k_completion_tokens_usd
        ) / 1000


class MachinePrice(BaseModel):
    """One's own machine, paid by the hour; a request costs its share of the engine's busy time."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_machine_hour_usd: Usd

    def cost_usd(self, prompt_tokens: int, completion_tokens: int, engine_seconds: float) -> float:
        return engine_seconds / 3600 * self.per_machine_hour_usd


def break_even_per_day(machine: MachinePrice, hosted_usd: float, capacity_per_day: float) -> float | None:
    """The requests a day from which one's own machine is cheaper than a hosted model; None when it never is.

    A machine that runs all day costs ``m = 24 * per_machine_hour_usd``, whatever it does; a hosted model costs
    `hosted_usd` a request, ``c``. With ``v`` requests a day the hosted one costs ``c v`` and one machine ``m``, so the
    machine is cheaper from ``v = m / c``. It answers at most `capacity_per_day` requests; where ``m / c`` is more than
    that, further machines cost more than they save, since even a busy one costs ``m / capacity > c`` a request.
    """
    if hosted_usd <= 0:
        return None
    volume = 24 * machine.per_machine_hour_usd / hosted_usd
    return volume if volume <= capacity_per_day else None


Price = TokenPrice | MachinePrice
_PRICE: TypeAdapter[Price] = TypeAdapter(Price)


def parse_price(price: Mapping[str, Any]) -> Price:
    """The `price` of a model's settings. Raises UsageError that says which two forms there are."""
    try:
        return _PRICE.validate_python(dict(price))
    except ValidationError as error:
        raise UsageError(
            "A price has the key per_machine_hour_usd, or the two keys per_1k_prompt_tokens_usd and "
            "per_1k_completion_tokens_usd, each a number of US dollars that is not negative.",
        ) from error


def in_force(monitoring: Mapping[str, Any], machine_usd_per_hour: float) -> Price:
    """The price that a model's monitoring settings name, or else the machine's."""
    own = monitoring.get("price")
    return parse_price(own) if own else MachinePrice(per_machine_hour_usd=machine_usd_per_hour)


def cost_usd(
    prompt_tokens: int, completion_tokens: int, engine_seconds: float, price: Price | Mapping[str, Any]
) -> float:
    """US dollars of one request (or of sums over many: the cost is linear)."""
    known = parse_price(price) if isinstance(price, Mapping) else price
    return known.cost_usd(prompt_tokens, completion_tokens, engine_seconds)
