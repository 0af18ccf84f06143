"""Latency: requests one at a time, and at a fixed load; the versions by turns.

At load every row counts once, so that `n` is that of distinct rows; what keeps the load up after the last is not
counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipelines.evaluation.comparison import compare, means
from pipelines.evaluation.hosted import NOT_APPLICABLE
from pipelines.evaluation.suites import Finding, Setting
from registry.statistics import Estimate, percentile_ci, percentile_difference


def measure(setting: Setting) -> Finding:
    """Tokens a second are those of a row's answer over its time. A hosted model's time is the whole request's, network
    included; its tokens, and those of another base, are of another kind."""
    results = setting.alone
    rates = {
        who: [len(r.tokens) / max(r.seconds, 1e-9) for r in answers]
        for who, answers in results.items()
        if who in setting.bench.versions
    }
    milliseconds: dict[str, list[float | None]] = {
        who: [1000 * r.seconds if math.isfinite(r.seconds) else None for r in answers]
        for who, answers in results.items()
    }
    if setting.hosted is not None:
        asked = setting.order[: len(results["candidate"])]
        milliseconds["hosted"] = [1000 * s if (s := setting.hosted.seconds.get(n)) is not None else None for n in asked]

    def p95(values: Sequence[float]) -> Estimate:
        return percentile_ci(values, 0.95, higher_is_better=False)

    def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
        return percentile_difference(one, other, 0.95, higher_is_better=False)

    metrics = {"p95_latency_ms": compare(milliseconds, p95, difference), **means({"tokens_per_second": rates})}
    if "candidate" not in rates:
        ours = ("tokens_per_second", "p95_latency_at_load_ms")
        return Finding(metrics=metrics, unavailable={name: NOT_APPLICABLE[name] for name in ours})
    loaded = {who: [1000 * r.seconds for r in answers] for who, answers in setting.at_load.items()}
    return Finding(metrics={**metrics, "p95_latency_at_load_ms": compare(loaded, p95, difference)})
