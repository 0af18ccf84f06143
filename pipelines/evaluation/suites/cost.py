"""Cost: what 1,000 requests cost on one's own machine and at a hosted model, and from which volume the machine pays.

A request costs its share of the machine's hour: measured one at a time, and at a load of `AT_ONCE` requests, where its
share is that of the time in which they are answered together, so that the mean is what the load's throughput costs. At
a hosted model it costs the tokens that it counted, whatever the load. The capacity that the break-even is held against
is that of one at a time, which is on the safe side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from pipelines.evaluation.answers import HostedResult
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import AT_ONCE, Finding, Setting
from registry.pricing import TokenPrice, break_even_per_day

METRIC, AT_LOAD = "cost_per_1000_usd", "cost_per_1000_at_load_usd"
_NAMES = {"candidate": "the new version", "champion": "the serving version", "hosted": "the hosted model"}


class Counted(Protocol):
    """An answer with its tokens, as the address that gave it counts them."""

    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...


def measure(setting: Setting) -> Finding:
    timed = setting.order[: len(setting.alone["candidate"])]
    costs: dict[str, list[float | None]] = {}
    notes = []
    for who, answers in setting.alone.items():
        costs[who] = [None] * len(setting.cases)
        for n, answer in zip(timed, answers, strict=True):
            if not isinstance(answer, HostedResult):
                costs[who][n] = 1000 * setting.machine.cost_usd(0, 0, answer.seconds)
    loaded: dict[str, list[float | None]] = {}
    for who, answers in setting.at_load.items():
        loaded[who] = [None] * len(setting.cases)
        for n, answer in zip(setting.order[: len(answers)], answers, strict=True):
            loaded[who][n] = 1000 * setting.machine.cost_usd(0, 0, answer.engine_seconds)
    for who, price, given in _hosted(setting):
        found, why = _by_tokens(price, given, "evaluation.hosted.price" if who == "hosted" else "hosted.price")
        if found:
            costs[who] = loaded[who] = found
        else:
            costs.pop(who, None)
            notes.append(f"The cost of {_NAMES[who]} is unavailable: {why}.")
    about: dict[str, Any] = {"machine_usd_per_hour": setting.machine.per_machine_hour_usd}
    metrics = means({METRIC: costs, AT_LOAD: loaded})
    hosted = [who for who, _, _ in _hosted(setting) if who in costs]
    own = [who for who in ("candidate", "champion") if who in costs and who not in hosted]
    if hosted and own and METRIC in metrics:
        broken_even = _break_even(setting, own[0], hosted[0], metrics[METRIC])
        notes += broken_even.pop("notes")
        about |= broken_even
    if notes:
        about["notes"] = notes
    why_not = {metric: notes[0].rstrip(".") for metric in (METRIC, AT_LOAD) if metric not in metrics}
    return Finding(metrics=metrics, about=about, unavailable=why_not)


def _hosted(setting: Setting) -> Iterator[tuple[str, TokenPrice | None, Sequence[Counted | None]]]:
    """Whoever answers over an address: its name, price, and answers to the test rows."""
    for who in setting.bench.hosted:
        yield who, setting.prices.get(who), [a for a in setting.answers[who] if isinstance(a, HostedResult)]
    if setting.hosted is not None and "unavailable" not in setting.hosted.about and setting.hosted_config is not None:
        price = setting.hosted_config.price
        yield "hosted", price.tokens if price is not None else None, setting.hosted.said


def _by_tokens(price: TokenPrice | None, given: Sequence[Counted | None], field: str) -> tuple[list[float | None], str]:
    """The cost of 1,000 requests like each row; empty, and why, when it cannot be told. `field` is where a pipeline
    file says the price."""
    if price is None:
        return [], f"no price is given ({field})"
    found = [
        1000 * price.cost_usd(said.prompt_tokens, said.completion_tokens, 0.0)
        if said is not None and said.prompt_tokens is not None and said.completion_tokens is not None
        else None
        for said in given
    ]
    return (
        (found, "") if any(f is not None for f in found) else ([], "its answers do not say how many tokens they have")
    )


def _break_even(setting: Setting, own: str, hosted: str, cost: dict[str, Any]) -> dict[str, Any]:
    """The volume from which a version on its machine is cheaper, with the interval of the hosted model's cost; see
    `registry.pricing.break_even_per_day`."""
    results = setting.alone[own]
    seconds = sum(result.seconds for result in results) / len(results)
    capacity = 86_400 / seconds
    machine, theirs = setting.machine, cost[hosted]
    # A cheaper hosted model moves the break-even up, so the ends change places
    volumes = {
        end: break_even_per_day(machine, (theirs[other] or 0.0) / 1000, capacity)
        for end, other in (("estimate", "estimate"), ("low", "high"), ("high", "low"))
    }
    hourly = machine.per_machine_hour_usd
    a_day = f"A machine at {hourly:g} USD an hour costs {24 * hourly:.2f} USD a day"
    loaded = setting.at_load[own]
    at_load = 86_400 * len(loaded) / sum(result.engine_seconds for result in loaded)
    able = f"answers up to {_round(capacity)} requests a day one at a time, {_round(at_load)} {AT_ONCE} at a time"
    costs = f"{_NAMES[hosted]} costs {theirs['estimate']:.4f} USD for 1,000 requests"
    if (volume := volumes["estimate"]) is None:
        note = f"{a_day} and {able}; {costs}: at no volume that it can answer is {_NAMES[own]} on it cheaper."
    else:
        between = [_round(v) if (v := volumes[end]) is not None else "never" for end in ("low", "high")]
        note = (
            f"{a_day} and {able}; {costs}. From {_round(volume)} requests a day (95 % interval {between[0]} to "
            f"{between[1]}) {_NAMES[own]} on its machine is cheaper."
        )
    return {
        "seconds_per_request": seconds,
        "capacity_per_day": capacity,
        "capacity_at_load_per_day": at_load,
        "break_even_per_day": volumes,
        "notes": [note],
    }


def _round(value: float) -> str:
    """Three significant digits; more would claim what was not measured."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.2g}"
