"""Latency: requests one at a time, the versions by turns."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.data.split import position
from pipelines.evaluation.comparison import compare, means
from pipelines.evaluation.suites import Finding, Setting
from registry.statistics import Estimate, percentile_ci, percentile_difference

_ROWS, _SECONDS, _LEAST = 24, 30.0, 6


def measure(setting: Setting) -> Finding:
    """Tokens a second are those of a row's answer over its time."""
    setting.say("latency")
    bench, most = setting.bench, setting.max_tokens
    chosen = sorted(setting.cases, key=lambda case: position(case.row.id, setting.seed + 1))[:_ROWS]
    bench.alone(chosen[:1], max_tokens=4, seconds=0, least=1)  # what the first request pays is nobody's latency
    results = bench.alone(chosen, max_tokens=most, seconds=_SECONDS, least=_LEAST)
    milliseconds = {who: [1000 * r.seconds for r in answers] for who, answers in results.items()}
    rates = {who: [len(r.tokens) / max(r.seconds, 1e-9) for r in answers] for who, answers in results.items()}

    def p95(values: Sequence[float]) -> Estimate:
        return percentile_ci(values, 0.95, higher_is_better=False)

    def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
        return percentile_difference(one, other, 0.95, higher_is_better=False)

    return Finding(
        metrics={
            "p95_latency_ms": compare(milliseconds, p95, difference),
            **means({"tokens_per_second": rates}),
        }
    )
