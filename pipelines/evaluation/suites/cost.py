"""Cost: what 1,000 requests cost on one's own machine and at a hosted model, and from which volume the machine pays.

A request costs its share of the machine's hour, as measured one at a time; at a hosted model the price of the tokens
that it counted. A machine that answers several requests at once costs less than that, so the figures for one's own
machine, and the capacity that the break-even is held against, are on the safe side.
"""

from __future__ import annotations

from typing import Any

from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting
from registry.pricing import break_even_per_day

METRIC = "cost_per_1000_usd"


def measure(setting: Setting) -> Finding:
    timed = setting.order[: len(setting.alone["candidate"])]
    costs: dict[str, list[float | None]] = {}
    for who, answers in setting.alone.items():
        costs[who] = [None] * len(setting.cases)
        for n, answer in zip(timed, answers, strict=True):
            costs[who][n] = 1000 * setting.machine.cost_usd(0, 0, answer.seconds)
    about: dict[str, Any] = {"machine_usd_per_hour": setting.machine.per_machine_hour_usd}
    if setting.hosted is not None and "unavailable" not in setting.hosted.about:
        hosted, why = _hosted(setting)
        if hosted:
            costs["hosted"] = hosted
        else:
            about["notes"] = [f"The hosted model's cost is unavailable: {why}."]
    metrics = means({METRIC: costs})
    if "hosted" in costs:
        about |= _break_even(setting, metrics[METRIC])
    return Finding(metrics=metrics, about=about)


def _hosted(setting: Setting) -> tuple[list[float | None], str]:
    """The cost of 1,000 requests like each row; empty, and why, when it cannot be told."""
    assert setting.hosted is not None and setting.hosted_config is not None  # noqa: S101, PT018
    price = setting.hosted_config.price
    if price is None:
        return [], "no price is given (evaluation.hosted.price)"
    found: list[float | None] = []
    for said in setting.hosted.said:
        known = said is not None and said.prompt_tokens is not None and said.completion_tokens is not None
        found.append(
            1000 * price.tokens.cost_usd(said.prompt_tokens or 0, said.completion_tokens or 0, 0.0)
            if said is not None and known
            else None
        )
    return (
        (found, "") if any(f is not None for f in found) else ([], "its answers do not say how many tokens they have")
    )


def _break_even(setting: Setting, cost: dict[str, Any]) -> dict[str, Any]:
    """The volume from which the candidate on its machine is cheaper, with the interval of the hosted model's cost; see
    `registry.pricing.break_even_per_day`."""
    results = setting.alone["candidate"]
    seconds = sum(result.seconds for result in results) / len(results)
    capacity = 86_400 / seconds
    machine, hosted = setting.machine, cost["hosted"]
    # A cheaper hosted model moves the break-even up, so the ends change places
    volumes = {
        end: break_even_per_day(machine, (hosted[other] or 0.0) / 1000, capacity)
        for end, other in (("estimate", "estimate"), ("low", "high"), ("high", "low"))
    }
    hourly = machine.per_machine_hour_usd
    a_day = f"A machine at {hourly:g} USD an hour costs {24 * hourly:.2f} USD a day"
    able = f"answers up to {_round(capacity)} requests a day, one at a time"
    theirs = f"the hosted model costs {hosted['estimate']:.4f} USD for 1,000 requests"
    if (volume := volumes["estimate"]) is None:
        note = f"{a_day} and {able}; {theirs}: at no volume that it can answer is the new version on it cheaper."
    else:
        between = [_round(v) if (v := volumes[end]) is not None else "never" for end in ("low", "high")]
        note = (
            f"{a_day} and {able}; {theirs}. From {_round(volume)} requests a day (95 % interval {between[0]} to "
            f"{between[1]}) the new version on its machine is cheaper."
        )
    return {
        "seconds_per_request": seconds,
        "capacity_per_day": capacity,
        "break_even_per_day": volumes,
        "notes": [note],
    }


def _round(value: float) -> str:
    """Three significant digits; more would claim what was not measured."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.2g}"
