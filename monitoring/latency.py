"""Latency, errors and throughput of a window, as the pages and `tunesmith monitor` show them."""

from __future__ import annotations

from typing import Any

from monitoring import windows
from monitoring.windows import Counts, Window


def percentiles(counts: Counts) -> dict[str, float | int | None]:
    """p50, p95 and p99 in milliseconds, each within `relative_error` of the true one; null without answers."""
    return {
        "p50": windows.percentile(counts, 0.50),
        "p95": windows.percentile(counts, 0.95),
        "p99": windows.percentile(counts, 0.99),
        "n": sum(counts.values()),
        "relative_error": windows.RELATIVE_ERROR,
    }


def summary(window: Window) -> dict[str, Any]:
    """The figures of a window. `error_rate` is the share of answers with status 500 or more; `tokens_per_second`
    are completion tokens over the engine's busy time, None of a hosted model."""
    return {
        "requests": window.requests,
        "errors": window.errors,
        "error_rate": window.errors / window.requests if window.requests else 0.0,
        "status": {str(code): n for code, n in sorted(window.status.items())},
        "latency_ms": percentiles(window.latency_ms),
        "ttft_ms": percentiles(window.ttft_ms),
        "prompt_tokens": window.prompt_tokens,
        "completion_tokens": window.completion_tokens,
        "tokens_per_second": window.completion_tokens / window.engine_seconds if window.engine_us else None,
        "cost_usd": window.cost_usd,
    }
