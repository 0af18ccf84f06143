"""The usual hours of a version: how its traffic was at the same hours of its first days, by which the rhythm of the day
is told from drift. Requests of the night differ from those of noon, and from the training data, every night.

A feature that has moved against the reference, over less than a day, is judged by its usual hours instead where

1. the last 24 hours together have not moved against the reference. A rhythm of the day cancels out over a whole day;
   drift that stays does not, so yesterday's never excuses today's;
2. at least two of the version's first seven days are usual: what was seen once is no rhythm. A day is usual when it
   has, as a whole, not moved against the reference, and when its same hours are like those of the usual days before
   it, so that what began in some night is in none of the nights that later ones are compared with. Days are taken from
   the version's beginning and not from last week: they are as fixed as the reference, and drift that lasts or creeps
   does not become the custom;
3. those days' hours together differ from the reference themselves, beyond chance. What these hours have in common with
   few requests, which are like anything, excuses nothing.

It is drift still where these hours differ from the usual ones. An alarm thus needs both comparisons, each made at the
level of Bonferroni's correction over all features (an intersection-union test, whose level is that of its parts; Berger
1982, Technometrics 24): there are never more alarms than without, and hours that are as usual are called drift as
seldom as quiet traffic is. Days and hours are let in by stricter tests, at one in a hundred for each feature: what is
wrongly left out costs an alarm that there was before.

A day is 24 hours that end where the judged time does, by whole hours of UTC; of an hour that the judged time has a part
of, as large a part counts. A rhythm of the week is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from infra.db import Connection, load_queries
from monitoring import windows
from monitoring.windows import Window

SQL = load_queries(Path(__file__).with_suffix(".sql"))

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
FIRST_DAYS = 7  # of a version that can be usual
LEAST_DAYS = 2  # that must be

Hours = Sequence[Window]  # the 24 of a day, in their order; an hour without traffic is an empty window


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """The last 24 hours, the version's first days (the earliest first), and of each hour of a day the part that is of
    the judged time."""

    today: Hours
    earlier: Sequence[Hours]
    parts: Sequence[float]


def read(conn: Connection, model: str, version: int, since: datetime, until: datetime, *, least: int) -> Rhythm:
    """For what a version served between two times less than a day apart. Days of fewer than `least` requests, or of
    before hours are kept, are none."""
    end = windows.ceil(until, "hour")
    first = conn.execute(SQL["first_days"], {
        "model": model, "version": version, "end": end, "least": least, "most": FIRST_DAYS,
    })  # fmt: skip
    earlier = [_hours(conn, model, version, end - row["back"] * DAY) for row in first.fetchall()]
    parts = [max(0.0, (min(until, start + HOUR) - max(since, start)) / HOUR) for start in _starts(end)]
    return Rhythm(today=_hours(conn, model, version, end), earlier=earlier, parts=parts)


def _hours(conn: Connection, model: str, version: int, end: datetime) -> Hours:
    points = windows.series(conn, model, [version], end - DAY, end, "hour")
    found = {point.start: point.window for point in points}
    return [found.get(start, Window()) for start in _starts(end)]


def _starts(end: datetime) -> list[datetime]:
    return [end - back * HOUR for back in range(24, 0, -1)]
