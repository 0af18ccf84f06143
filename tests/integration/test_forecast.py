"""What a month will come to, from days that are known."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

import pytest
import traffic
from psycopg.types.json import Jsonb

from infra.db import Connection, transaction
from infra.settings import Settings
from monitoring import cost, windows
from monitoring.windows import Window

NOW = datetime(2026, 9, 20, 12, tzinfo=UTC)  # a Sunday noon: ten days and a half are left of the month


def spent(conn: Connection, day: datetime, usd: float) -> None:
    window = Window(requests=1, cost_nano_usd=round(usd * 1e9))
    conn.execute(
        "insert into traffic_window (model, version, grain, start, requests, errors, sketches)"
        " values ('m', 1, 'day', %s, 1, 0, %s)",
        (day, Jsonb(windows.to_json(window))),
    )


@pytest.fixture
def model(database: Settings) -> None:
    with transaction() as conn:
        traffic.register(conn, "m", 1, traffic.profile([], []), settings={})


def days(count: int) -> list[datetime]:
    """The full days before NOW, the last first."""
    today = windows.floor(NOW, "day")
    return [today - timedelta(days=n) for n in range(1, count + 1)]


@pytest.mark.usefixtures("model")
def test_a_month_goes_on_by_weekday() -> None:
    """Three dollars on working days, half a dollar at weekends, for four weeks."""
    with transaction() as conn:
        for day in days(28):
            spent(conn, day, 0.5 if day.weekday() >= 5 else 3.0)
        spent(conn, windows.floor(NOW, "day"), 0.25)
        found = cost.forecast(conn, "m", NOW)
    # 1 to 19 September 2026 are 14 working days and 5 at weekends; 21 to 30 are 8 and 2
    assert found["spent"] == pytest.approx(14 * 3 + 5 * 0.5 + 0.25)
    assert found["expected"] == pytest.approx(found["spent"] + 0.25 + 8 * 3 + 2 * 0.5)
    assert (found["low"], found["high"]) == pytest.approx((found["expected"], found["expected"]))
    assert found["by"] == "the last 28 full days, by weekday"


@pytest.mark.usefixtures("model")
def test_few_days_are_said_and_days_without_traffic_count() -> None:
    with transaction() as conn:
        for day in days(2):
            spent(conn, day, 1.0)
        few = cost.forecast(conn, "m", NOW)
        spent(conn, days(4)[3], 1.0)
        four = cost.forecast(conn, "m", NOW)
    assert (few["expected"], few["by"]) == (None, "2 full days so far, too few to say")
    assert four["expected"] == pytest.approx(3 + 0.75 / 2 + 10 * 0.75)
    assert four["low"] < four["expected"] < four["high"]


@pytest.mark.usefixtures("model")
def test_the_months_last_day_is_as_unsure_as_a_day() -> None:
    last = datetime(2026, 9, 30, 0, 10, tzinfo=UTC)
    with transaction() as conn:
        for ago, usd in enumerate((1.0, 3.0, 2.0), start=1):
            spent(conn, windows.floor(last, "day") - timedelta(days=ago), usd)
        found = cost.forecast(conn, "m", last)
    # Student's 97.5 % quantile with two degrees of freedom is 4.303; of a day, and of the mean of three
    rest = 1 - 10 / 1440
    assert found["high"] - found["expected"] == pytest.approx(4.303 * math.sqrt(rest + rest**2 / 3), rel=1e-3)


@pytest.mark.usefixtures("model")
def test_the_interval_holds_as_often_as_it_says() -> None:
    """Days that cost at random: the month's real end lies within in 95 % of 200 months, or a few less."""
    draw, inside = random.Random(1), 0
    for _ in range(200):
        with transaction() as conn:
            for day in days(28):
                spent(conn, day, draw.gauss(10, 2))
            found = cost.forecast(conn, "m", NOW)
            conn.rollback()
        real = found["spent"] + draw.gauss(10, 2) / 2 + sum(draw.gauss(10, 2) for _ in range(10))
        inside += found["low"] <= real <= found["high"]
    assert inside >= 175
