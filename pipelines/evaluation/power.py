"""What a comparison can tell: whether a difference is shown, how small a one the rows could have shown, and how many
rows would show the one that was seen. Read from an estimate's JSON, so that evaluations of any age can be shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from registry.statistics import Estimate, detectable, rows_for

_MANY = 1_000_000  # more rows than that nobody has


@dataclass(frozen=True, kw_only=True)
class Power:
    """`effect` of a paired difference; `least`, the smallest true difference of its direction that is shown on as many
    rows in 80 % of all repetitions, in the metric's unit; `rows`, how many would show the difference seen, where it is
    not shown. None: not known. An effect that was not shown, but could be on more rows, has too few."""

    effect: Literal["better", "worse", "not shown", "too few rows"]
    least: float | None
    rows: int | None


def of(difference: Mapping[str, Any]) -> Power:
    estimate = Estimate.from_json(dict(difference))
    ends = sorted((estimate.low, estimate.high) if estimate.higher_is_better else (-estimate.low, -estimate.high))
    # An interval may reach further to one side: a loss is shown by its other end than a gain
    bad = (estimate.estimate >= 0) == estimate.higher_is_better
    toward = replace(estimate, higher_is_better=estimate.estimate >= 0, error=estimate.error if bad else None)
    shows = detectable(toward)
    least = shows if math.isfinite(shows) and shows > 0 else None
    if ends[0] > 0 or ends[1] < 0:
        return Power(effect="better" if ends[0] > 0 else "worse", least=least, rows=None)
    distance = abs(estimate.estimate)
    rows = None
    if least is not None and math.isfinite(distance) and distance > 1e-9:
        needed = max(rows_for(toward, distance), estimate.n + 1)
        rows = needed if needed <= _MANY else None
    return Power(effect="too few rows" if rows is not None else "not shown", least=least, rows=rows)


def in_words(power: Power, form: str) -> str:
    """Such as ``about 350 rows would show this much; these could show 0.050``; empty where nothing is known."""
    needed = f"about {power.rows:,} rows would show this much" if power.rows is not None else ""
    least = f"these could show {form.format(power.least)} or more" if power.least is not None else ""
    return "; ".join(part for part in (needed, least) if part)
