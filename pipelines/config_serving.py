"""The sections of a pipeline file for what comes after a version is made: how it is tried out on traffic, how it is
watched, and when it is trained again."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from infra.durations import format_duration, parse_duration
from infra.errors import TunesmithError
from pipelines.config_address import Section
from registry.names import parse_share
from registry.rollouts import Plan


def _duration(value: Any) -> Any:
    if isinstance(value, str):
        return parse_duration(value)
    raise ValueError(f"{value!r} has no unit; write it as 90s, 15m, 24h or 7d")


def _share(value: Any) -> Any:
    """10% or 0.1, as on the command line; a bare 1 is all of the traffic here, since it can only come last."""
    if isinstance(value, bool) or not isinstance(value, str | float | int):
        raise ValueError(f"{value!r} is no share; write 10% or 0.1")
    if isinstance(value, str):
        try:
            return parse_share(value)
        except TunesmithError as error:
            raise ValueError(error.message) from error
    return value


Duration = Annotated[timedelta, BeforeValidator(_duration), PlainSerializer(format_duration, return_type=str)]
_PLAN = Plan()


class Rollout(Section):
    """With ``promote: canary``: the shares of the traffic that a version gets one after the other, what a step takes,
    and how often a version that is no worse may be taken back. `ignore` names what may be worse: ``long`` where longer
    answers are no worse ones, say."""

    steps: tuple[Annotated[float, BeforeValidator(_share)], ...] = _PLAN.steps
    min_requests: int = _PLAN.min_requests
    min_time: Duration = timedelta(minutes=_PLAN.min_minutes)
    max_time: Duration = timedelta(hours=_PLAN.max_hours)
    alpha: float = _PLAN.alpha
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> Rollout:
        try:
            self.plan()
        except TunesmithError as error:
            raise ValueError(error.message) from error
        return self

    def plan(self) -> Plan:
        return Plan(
            steps=self.steps,
            min_requests=self.min_requests,
            min_minutes=self.min_time.total_seconds() / 60,
            max_hours=self.max_time.total_seconds() / 3600,
            alpha=self.alpha,
            ignore=self.ignore,
        )


class Retrain(Section):
    """A verdict starts it; the guards stop it from running away. `replay` is the number of old rows for each new
    one, so that the old world is not forgotten."""

    on: Literal["drift", "never"] = "drift"
    min_rows: int = Field(default=200, ge=1)
    cooldown: Duration = timedelta(hours=24)
    trials: int = Field(default=4, ge=1, le=10_000)
    replay: float = Field(default=1.0, ge=0, le=100)
    start_from: Literal["champion", "base"] = "champion"


class Alert(Section):
    """Told when a figure of the window is above or below a limit."""

    metric: Literal["p50_latency_ms", "p95_latency_ms", "p99_latency_ms", "p95_ttft_ms", "error_rate", "cost_usd"]
    above: float | None = None
    below: float | None = None
    severity: Literal["info", "warning", "critical"] = "warning"

    @model_validator(mode="after")
    def _limited(self) -> Alert:
        if (self.above is None) == (self.below is None):
            raise ValueError("needs exactly one limit; add above: 2000, say")
        return self


class Monitoring(Section):
    """What is kept of requests, and when the watcher speaks. `price` as in registry/pricing.py; without it, the
    machine's hourly price of the settings. `rescore` is when what serves is asked its golden set again: a cron
    expression, in UTC."""

    keep_text: bool = False
    min_requests: int = Field(default=100, ge=1)
    window: Duration = timedelta(hours=24)
    alerts: tuple[Alert, ...] = ()
    price: dict[str, float] | None = None
    rescore: str | None = None

    @field_validator("rescore")
    @classmethod
    def _times(cls, value: str | None) -> str | None:
        if value is not None:
            from pipelines.schedules import check_times

            try:
                check_times(value, "UTC")
            except TunesmithError as error:
                raise ValueError(error.message.rstrip(".")) from error
        return value

    @field_validator("price")
    @classmethod
    def _price(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None:
            from registry.pricing import parse_price

            try:
                parse_price(value)
            except TunesmithError as error:
                raise ValueError(error.message) from error
        return value
