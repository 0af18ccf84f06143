"""A model's traffic over a range, cut into the buckets of a chart; read from windows, never from requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

from infra.db import Connection, one
from monitoring import windows
from monitoring.console.charts import Times
from monitoring.console.render import RANGES, SQL
from monitoring.windows import GRAINS, Grain, Window

# range -> the grain that is read, and the length of a bucket
_BUCKETS: Mapping[timedelta, tuple[Grain, timedelta, str]] = {
    RANGES["1h"]: ("minute", timedelta(minutes=1), "minute"),
    RANGES["6h"]: ("minute", timedelta(minutes=10), "10 minutes"),
    RANGES["24h"]: ("hour", timedelta(hours=1), "hour"),
    RANGES["7d"]: ("hour", timedelta(hours=4), "4 hours"),
    RANGES["30d"]: ("day", timedelta(days=1), "day"),
}


@dataclass(frozen=True)
class Stats:
    """The figures of one window, as pages show them; None where there were no requests."""

    window: Window

    @property
    def requests(self) -> int:
        return self.window.requests

    @property
    def errors(self) -> int:
        return self.window.errors

    @property
    def error_rate(self) -> float | None:
        return self.window.errors / self.window.requests if self.window.requests else None

    @cached_property
    def p50(self) -> float | None:
        return windows.percentile(self.window.latency_ms, 0.50)

    @cached_property
    def p95(self) -> float | None:
        return windows.percentile(self.window.latency_ms, 0.95)

    @cached_property
    def p99(self) -> float | None:
        return windows.percentile(self.window.latency_ms, 0.99)

    @cached_property
    def ttft_p50(self) -> float | None:
        return windows.percentile(self.window.ttft_ms, 0.50)

    @cached_property
    def ttft_p95(self) -> float | None:
        return windows.percentile(self.window.ttft_ms, 0.95)

    @property
    def cost_usd(self) -> float:
        return self.window.cost_usd

    @property
    def cost_per_1000(self) -> float | None:
        return 1000 * self.window.cost_usd / self.window.requests if self.window.requests else None

    @property
    def rated(self) -> int:
        return self.window.feedback.get("rated", 0)

    @property
    def disliked(self) -> float | None:
        return self.window.feedback.get("disliked", 0) / self.rated if self.rated else None

    @property
    def tokens(self) -> int:
        return self.window.prompt_tokens + self.window.completion_tokens

    @property
    def mean_completion_tokens(self) -> float | None:
        return self.window.completion_tokens / self.window.answered if self.window.answered else None

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self.window.engine_seconds
        return self.window.completion_tokens / seconds if seconds else None


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """`total` and `buckets` are of all versions together, but for those that had copies alone, which answered nobody;
    `series` are of each version with traffic. Both run along `times`."""

    times: Times
    step: str
    total: Stats
    buckets: Sequence[Stats]
    series: Mapping[int, Sequence[Stats]]
    by_version: Mapping[int, Stats]


def natural_range(conn: Connection, model: str) -> str:
    """The smallest range that shows all of a young model's traffic; a day for others."""
    first = one(conn, SQL["first_window"], {"model": model})["start"]
    age = datetime.now(UTC) - first if first else timedelta(0)
    return next((name for name in ("1h", "6h") if age <= RANGES[name]), "24h")


def read(conn: Connection, model: str, span: timedelta) -> Traffic:
    """The traffic from `span` ago (one of RANGES) until now, the last bucket being the one that is not over yet.
    Sketches of features are not read."""
    grain, length, step = _BUCKETS[span]
    now = datetime.now(UTC)
    until = windows.floor(now, grain) + GRAINS[grain]
    count = round(span / length)
    starts = [until - (count - i) * length for i in range(count)]
    cells: dict[tuple[int, int], list[Window]] = {}
    for row in conn.execute(SQL["windows"], {"model": model, "grain": grain, "since": starts[0], "until": until}):
        index = int((row["start"] - starts[0]) / length)
        cells.setdefault((row["version"], index), []).append(windows.from_row(row))
    merged = {key: windows.total(found) for key, found in cells.items()}
    versions = sorted({version for version, _ in merged})
    empty = Window()
    answered = {key: window for key, window in merged.items() if window.requests > window.slots.get("shadow", 0)}
    return Traffic(
        times=Times(starts=starts, since=starts[0], until=until, unfinished=True),
        step=step,
        total=Stats(windows.total(answered.values())),
        buckets=[Stats(windows.total(answered.get((v, i), empty) for v in versions)) for i in range(count)],
        series={v: [Stats(merged.get((v, i), empty)) for i in range(count)] for v in versions},
        by_version={v: Stats(windows.total(w for (n, _), w in merged.items() if n == v)) for v in versions},
    )
