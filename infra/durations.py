"""Durations as people write them: 90s, 15m, 24h, 7d, 2w, and sums such as 1h30m; and times."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from infra.errors import UsageError

_SECONDS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}


def parse_duration(text: str) -> timedelta:
    """``"24h"`` as a timedelta. Raises ValueError, saying what is accepted."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([wdhms])", text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != re.sub(r"\s", "", text):
        raise ValueError(f"{text!r} is not a duration; write it as 90s, 15m, 24h or 7d")
    total = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if total > 3_650 * 86_400:
        raise ValueError(f"{text!r} is longer than ten years")
    return timedelta(seconds=total)


def parse_time(option: str, text: str, *, before: datetime | None = None) -> datetime:
    """A time as RFC 3339, or a duration before another time, given by a command's `option`. Raises UsageError."""
    if before is not None:
        try:
            return before - parse_duration(text)
        except ValueError:
            pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        accepted = "24h, or 2026-11-23T08:00:00Z" if before is not None else "2026-11-23T08:00:00Z"
        raise UsageError(f"{option} {text[:80]!a} is no time.", hint=f"Such as {accepted}.") from None
    return at.replace(tzinfo=at.tzinfo or UTC)


def format_duration(duration: timedelta) -> str:
    """The shortest form that `parse_duration` reads back: ``24h`` for a day, ``90s`` for a minute and a half."""
    seconds = round(duration.total_seconds())
    for unit, size in _SECONDS.items():
        if unit not in "wd" and seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
