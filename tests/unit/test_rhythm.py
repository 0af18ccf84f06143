"""The rhythm of the day is no drift; what comes on top of it, and what stays, is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from monitoring import drift, statistics
from monitoring.rhythm import FIRST_DAYS, Hours, Rhythm
from monitoring.windows import Window, total
from registry.profile import FEATURE, Profile

NAMES = ("words", "topic", "refusal", "unseen_word_share")
SPAN = 4  # hours that are judged: 20:00 to 24:00 of each day, or 8:00 to 12:00
PARTS = [0.0] * (24 - SPAN) + [1.0] * SPAN
NIGHT, NOON = 24, 12
PER_HOUR = 60

Shares = dict[str, NDArray[np.float64]]
World = Callable[[int, int], Shares]  # of a day, from 0, and an hour


def shares(of: float) -> Shares:
    """Requests of one kind, and the larger `of`, of another: longer, about other things, refused more, in new words."""
    words = np.exp(-0.5 * ((np.arange(FEATURE["words"].bins) - 12 - 8 * of) / 3) ** 2)
    topic = np.maximum(0, 1 - of * (np.arange(FEATURE["topic"].bins) < 12) - (1 - of) * (np.arange(33) >= 20))
    unseen = np.exp(-np.arange(FEATURE["unseen_word_share"].bins) / (2 + 12 * of))
    refused = np.array([0.97 - 0.5 * of, 0.03 + 0.5 * of])
    return {
        name: weights / weights.sum()
        for name, weights in zip(NAMES, (words, topic, refused, unseen), strict=True)
    }  # fmt: skip


DAY_KIND, NIGHT_KIND, NEW = shares(0), shares(0.9), shares(1.8)


def quiet(day: int, hour: int) -> Shares:
    """Four of 24 hours are of another kind."""
    return NIGHT_KIND if hour >= 20 else DAY_KIND


def mixed(world: Shares, share: float, other: Shares = NEW) -> Shares:
    return {name: (1 - share) * world[name] + share * other[name] for name in NAMES}


def made_of(rows: int = 3000) -> Profile:
    """The reference: of all hours."""
    random = np.random.default_rng(99)
    whole = {name: sum((quiet(0, hour)[name] for hour in range(24)), np.zeros(FEATURE[name].bins)) for name in NAMES}
    return Profile(histograms={
        name: tuple(int(n) for n in random.multinomial(rows, whole[name] / whole[name].sum())) for name in NAMES
    })  # fmt: skip


def traffic(world: World, days: int, seed: int, per_hour: int = PER_HOUR) -> list[list[Window]]:
    random = np.random.default_rng(seed)

    def window(day: int, hour: int) -> Window:
        n, found = int(random.poisson(per_hour)), world(day, hour)
        counts = {name: dict(enumerate(random.multinomial(n, found[name]).tolist())) for name in NAMES}
        return Window(requests=n, status={200: n}, features=counts)

    return [[window(day, hour) for hour in range(24)] for day in range(days)]


def judged(days: Sequence[Hours], day: int, until: int, reference: Profile) -> list[drift.Moved]:
    """As drift.judge does it at an hour of a day, by the rule; the version began with the first of the days."""
    hours = [hour for each in days for hour in each][: 24 * day + until]
    live = total(hours[-SPAN:])
    compared = drift.compare(reference, {name: live.histogram(name) for name in NAMES})
    whole = [hours[end - 24 : end] for end in range(len(hours) - 24, 23, -24)][::-1]
    return drift.beside_usual(compared, Rhythm(today=hours[-24:], earlier=whole[:FIRST_DAYS], parts=PARTS))


def alarm(moved: Sequence[drift.Moved]) -> bool:
    return any(m.drifted for m in moved)


REFERENCE = made_of()


def test_a_night_is_told_until_it_is_known_and_then_no_more() -> None:
    days = traffic(quiet, 14, seed=1)
    without = [
        alarm(drift.compare(REFERENCE, {name: total(day[-SPAN:]).histogram(name) for name in NAMES})) for day in days
    ]
    assert all(without), "by the reference alone, every night"
    found = [judged(days, day, NIGHT, REFERENCE) for day in range(14)]
    assert [alarm(moved) for moved in found] == [True, True] + [False] * 12
    night = {m.feature.name: m for m in found[-1]}
    assert all(m.usual and m.usual_days == FIRST_DAYS for m in night.values())
    assert night["words"].to_json()["usual"]["from_reference"] > night["words"].threshold > night["words"].value
    assert not any(alarm(judged(days, day, NOON, REFERENCE)) for day in range(3, 14)), "noon has a rhythm too"


def test_what_comes_on_top_of_a_night_is_found() -> None:
    def shifted(day: int, hour: int) -> Shares:
        return mixed(quiet(day, hour), 0.35) if day == 10 and hour >= 20 else quiet(day, hour)

    alarms = 0
    by_all_days: list[drift.Moved] = []
    for seed in range(10):
        days = traffic(shifted, 11, seed=seed)
        alarms += alarm(judged(days, 9, NIGHT, REFERENCE))
        moved = judged(days, 10, NIGHT, REFERENCE)
        assert "words" in {m.feature.name for m in moved if m.drifted}, seed
        for m in moved:
            if m.drifted and m.usual_days == FIRST_DAYS:
                by_all_days.append(m)
                assert m.before == tuple(np.sum([[w.histogram(m.feature.name) for w in day[-SPAN:]]
                                                 for day in days[:FIRST_DAYS]], axis=(0, 1)))  # fmt: skip
    assert alarms <= 1  # of 10 quiet nights; more are seen in less than one of two hundred such tests
    assert by_all_days


@pytest.mark.parametrize("begins", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("only_at_night", [False, True])
def test_what_stays_is_told_on_every_later_day(begins: int, *, only_at_night: bool) -> None:
    def shifted(day: int, hour: int) -> Shares:
        here = day >= begins and (hour >= 20 if only_at_night else True)
        return mixed(quiet(day, hour), 0.4) if here else quiet(day, hour)

    if begins == 0 and only_at_night:
        pytest.skip("from the first night on it is the rhythm")
    days = traffic(shifted, 13, seed=begins)
    assert all(alarm(judged(days, day, NIGHT, REFERENCE)) for day in range(begins, 13))
    if not only_at_night:
        assert all(alarm(judged(days, day, NOON, REFERENCE)) for day in range(max(1, begins), 13))


def test_days_that_are_all_night_are_no_rhythm() -> None:
    """Each of its nights is as the nights before; the days are not."""
    days = traffic(lambda day, hour: NIGHT_KIND if day >= 8 else quiet(day, hour), 14, seed=3)
    assert not alarm(judged(days, 7, NIGHT, REFERENCE))
    assert all(alarm(judged(days, day, hour, REFERENCE)) for day in range(9, 14) for hour in (NOON, NIGHT))


def test_what_creeps_in_does_not_become_the_custom() -> None:
    days = traffic(lambda day, hour: mixed(quiet(day, hour), min(0.9, 0.04 * day)), 21, seed=4)
    assert all(alarm(judged(days, day, NIGHT, REFERENCE)) for day in range(14, 21))


def test_few_requests_excuse_nothing() -> None:
    """Nights of a dozen requests are like anything at all."""
    days = traffic(quiet, 4, seed=5)
    for day in days[:3]:
        day[-SPAN:] = [Window(requests=3, features={n: {0: 3} for n in NAMES})] * SPAN
    assert alarm(judged(days, 3, NIGHT, REFERENCE))


def test_hours_that_have_no_rhythm_excuse_nothing() -> None:
    """With so few requests, what moved looks like the reference's own kind on earlier days half of the time."""
    random = np.random.default_rng(11)
    flat = Profile(histograms={n: tuple(random.multinomial(3000, DAY_KIND[n]).tolist()) for n in NAMES})
    seen = 0
    for seed in range(12):
        days = traffic(lambda day, hour: mixed(DAY_KIND, 0.35 if (day, hour // 20) == (3, 1) else 0), 4, seed, 10)
        live = total(days[3][-SPAN:])
        compared = drift.compare(flat, {name: live.histogram(name) for name in NAMES})
        seen += alarm(compared)
        assert {m.feature.name for m in compared if m.drifted} == {
            m.feature.name for m in judged(days, 3, NIGHT, flat) if m.drifted
        }
    assert seen >= 6


def test_a_part_of_an_hour_counts_as_a_part() -> None:
    days = traffic(quiet, 5, seed=8)
    live = total(days[4][-2:])
    compared = drift.compare(REFERENCE, {name: live.histogram(name) for name in NAMES})
    parts = [0.0] * 21 + [0.5, 1.0, 0.5]
    found = drift.beside_usual(compared, Rhythm(today=days[4], earlier=days[:4], parts=parts))
    expected = sum(w.requests * part for day in days[:4] for w, part in zip(day, parts, strict=True))
    assert [m.feature.name for m in found if m.usual_days == 4]
    for m in found:
        if m.usual_days == 4:
            assert sum(m.before) == pytest.approx(expected, abs=len(m.before) / 2)


def test_bursts_blunt_both_sides() -> None:
    days = traffic(quiet, 9, seed=7)
    hours = [hour for each in days for hour in each]
    live = total(hours[-SPAN:])
    rhythm = Rhythm(today=hours[-24:], earlier=days[:FIRST_DAYS], parts=PARTS)
    compared = drift.compare(REFERENCE, {"words": live.histogram("words")})
    [plain] = drift.beside_usual(compared, rhythm)
    [bursty] = drift.beside_usual(compared, rhythm, effects={"words": 4.0})
    assert bursty.threshold == pytest.approx(2 * plain.threshold, rel=0.15)
    [so_few] = drift.beside_usual(compared, rhythm, effects={"words": 2000.0})
    assert so_few == compared[0], "one request or so, on either side, could not tell"


def test_hours_as_usual_are_no_more_often_called_drift_than_quiet_ones() -> None:
    """At most one look in a hundred is promised, over all features."""
    alarms = 0
    for seed in range(40):
        days = traffic(quiet, 4, seed=seed)
        alarms += alarm(judged(days, 3, NIGHT, REFERENCE))
    assert alarms <= 2  # of 40, more are seen in less than one of a hundred such tests


HISTOGRAMS = st.lists(st.integers(0, 60), min_size=FEATURE["topic"].bins, max_size=FEATURE["topic"].bins)


@given(HISTOGRAMS, HISTOGRAMS, st.lists(HISTOGRAMS, max_size=3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_there_are_never_more_alarms_than_without(
    known: list[int],
    now: list[int],
    nights: list[list[int]],
    today_moves: bool,
) -> None:
    reference = Profile(histograms={"topic": tuple(known)})
    compared = drift.compare(reference, {"topic": now})

    def day(night: Sequence[int], rest: Sequence[int]) -> Hours:
        return [Window(features={"topic": dict(enumerate(n))}) for n in [rest] * 20 + [night] * SPAN]

    rhythm = Rhythm(
        today=day(now, now if today_moves else known), earlier=[day(n, known) for n in nights], parts=PARTS
    )  # fmt: skip
    beside = drift.beside_usual(compared, rhythm, resamples=200)
    assert [m.feature for m in beside] == [m.feature for m in compared]
    for before, after in zip(compared, beside, strict=True):
        assert after == before or before.drifted
        if after.usual:
            assert len(nights) >= 2
            assert statistics.js(*map(statistics.array, (after.before, after.now))) <= after.threshold
