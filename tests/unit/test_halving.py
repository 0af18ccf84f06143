"""Who goes on, and how trials end, as a function of jobs alone; and what a person's hand changes in it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from registry import halving
from registry.studies import Job

SPEC = halving.Plan(trials=18, rungs=(6, 18, 54), reduction=3)


def job(trial: int, rung: int = 0, value: float | None = None, state: str = "done", clone_of: int | None = None) -> Job:
    return Job(
        study="s", trial=trial, rung=rung, trial_id=trial, params={}, pack=trial, steps=SPEC.rungs[rung],
        state=state, token=1, attempts=1, worker=None, value=value,
        curve=None, checkpoint=None, tokens=None, seconds=None, adapter_parameters=None, error=None,
        updated_at=datetime(2026, 11, 24, tzinfo=UTC), clone_of=clone_of,
    )  # fmt: skip


def first_rung() -> list[Job]:
    """Nine trials, the higher the number the better."""
    return [job(n, value=9.0 - n) for n in range(9)]


def judged() -> list[Job]:
    """The same with the three best put up for the second rung."""
    return [*first_rung(), *(job(n, 1, state="waiting") for n in (6, 7, 8))]


def stands(jobs: list[Job], rung: int) -> list[int] | None:
    here = halving.standing(SPEC, halving.by_place(jobs), halving.groups(SPEC, jobs)[0], rung)
    return None if here is None else [j.trial for j in here]


def test_a_rung_is_judged_when_all_are_through() -> None:
    jobs = first_rung()
    assert stands(jobs, 0) == list(range(9))
    assert stands([*jobs[:8], replace(jobs[8], state="running")], 0) is None
    assert [j.trial for j in halving.chosen(SPEC, jobs)] == [8, 7, 6]
    assert stands(jobs, 1) is None  # chosen, but not put up
    assert stands(judged(), 1) is None
    assert set(halving.fates(SPEC, jobs).values()) == {None}  # nobody is told before the others are put up
    assert [halving.fates(SPEC, judged())[n] for n in range(9)] == ["pruned"] * 6 + [None] * 3


def test_no_fewer_go_on_than_there_are_finalists() -> None:
    two = replace(SPEC, finalists=2)
    assert [j.trial for j in halving.chosen(two, first_rung())] == [8, 7, 6]
    second = [job(n, 1, value=9.0 - n) for n in (6, 7, 8)]
    assert [j.trial for j in halving.chosen(two, second)] == [8, 7]
    assert [j.trial for j in halving.chosen(two, second[:1])] == [6]  # of one there are no two


@pytest.mark.parametrize("state", ["failed", "pruned"])
def test_who_failed_or_was_stopped_by_hand_has_no_place(state: str) -> None:
    jobs = first_rung()
    jobs[8] = replace(jobs[8], state=state)
    assert [j.trial for j in halving.chosen(SPEC, jobs)] == [7, 6, 5]
    assert halving.fates(SPEC, jobs)[8] == state
    later = [*judged()[:11], replace(job(8, 1), state=state)]  # after it was promoted: its place stays empty
    assert halving.fates(SPEC, later)[8] == state
    assert halving.fates(SPEC, later)[5] == "pruned"


def test_an_adapter_that_is_larger_than_allowed_takes_nobodys_place() -> None:
    spec = replace(SPEC, constraints={"adapter_parameters": 1000, "latency_ms": 5})
    jobs = [replace(j, adapter_parameters=2000 if j.trial in (7, 8) else 1000) for j in first_rung()]
    assert [j.trial for j in halving.chosen(spec, jobs)] == [6, 5, 4]
    jobs += [job(n, 1, state="waiting") for n in (6, 5, 4)]
    assert halving.fates(spec, jobs)[8] == "pruned"
    large = replace(job(20, value=0.1, clone_of=3), adapter_parameters=2000)
    assert halving.goes_on(spec, [*jobs, large], large) is False


def test_a_trial_ends_complete_on_the_last_rung_only() -> None:
    jobs = [*first_rung(), *(job(n, 1, value=9.0 - n) for n in (6, 7, 8)), job(8, 2, value=0.5)]
    assert [halving.fates(SPEC, jobs)[n] for n in (6, 7, 8)] == ["pruned", "pruned", "complete"]


def test_a_variant_takes_nobodys_place_and_does_not_shift_the_groups() -> None:
    variant = job(9, value=0.0, clone_of=3)
    drawn = [job(n, value=1.0) for n in range(10, 14)]
    jobs = [*judged(), variant, *drawn]
    assert halving.groups(SPEC, jobs) == [list(range(9)), [10, 11, 12, 13]]
    assert halving.groups(SPEC, [*judged(), variant]) == [list(range(9)), []]
    assert [j.trial for j in halving.chosen(SPEC, first_rung())] == [8, 7, 6]
    assert halving.fates(SPEC, jobs)[5] == "pruned"


@pytest.mark.parametrize(
    ("value", "going"),
    [(0.5, True), (1.5, True), (3.5, True), (4.5, False), (None, False)],  # there are four places for ten
)
def test_a_variant_goes_on_when_it_would_have_had_a_place(value: float | None, going: bool) -> None:
    variant = job(9, value=value, clone_of=3)
    jobs = [*judged(), variant]
    assert halving.goes_on(SPEC, jobs, variant) is going
    assert halving.fates(SPEC, jobs)[9] == (None if going else "pruned")


def test_a_variant_waits_for_the_group_it_is_measured_against() -> None:
    variant = job(9, value=4.5, clone_of=3)
    running = [*first_rung()[:8], job(8, state="running")]
    for jobs in (running, first_rung()):  # still running; not put up yet, so that a hand may still take one out
        assert halving.goes_on(SPEC, [*jobs, variant], variant) is None
        assert halving.fates(SPEC, [*jobs, variant])[9] is None
    second = job(9, 1, value=0.1, clone_of=3)
    at_second = [*judged(), job(9, value=0.5, clone_of=3), second]
    assert halving.goes_on(SPEC, at_second, second) is None
    through = [*first_rung(), *(job(n, 1, value=9.0 - n) for n in (6, 7, 8)), job(8, 2, state="waiting")]
    assert halving.goes_on(SPEC, [*through, second], second) is True


def test_a_variant_of_a_group_that_failed_whole_goes_on_alone() -> None:
    jobs = [job(n, state="failed") for n in range(9)]
    variant = job(9, 1, value=3.0, clone_of=0)
    assert halving.goes_on(SPEC, [*jobs, job(9, value=3.0, clone_of=0), variant], variant) is True
