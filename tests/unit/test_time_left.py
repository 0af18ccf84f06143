"""How long a search takes yet, and which budget ends it, as functions of its jobs."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from pipelines.tuning import budgets
from pipelines.tuning.spec import StudySpec
from registry.studies import Job

# Nine trials of 10 steps, of which three go on for 20 more, and one of them for 60
SPEC = StudySpec(
    study="s", model="m", base="b", dataset="d", system=None, max_tokens=9, trials=9, rungs=(10, 30, 90), reduction=3,
    space={}, workers=1, machine_usd_per_hour=3.6,
)  # fmt: skip
WHOLE = 9 * 10 + 3 * 20 + 60


def job(trial: int, rung: int = 0, state: str = "done", **more: Any) -> Job:
    """Of two seconds and five tokens a step."""
    steps = (10, 20, 60)[rung]
    spent = {"tokens": 5 * steps, "seconds": 2.0 * steps} if state == "done" else {"tokens": None, "seconds": None}
    fields: dict[str, Any] = {
        "study": "s", "trial": trial, "rung": rung, "trial_id": trial, "params": {}, "pack": trial,
        "steps": SPEC.rungs[rung], "state": state, "token": 1, "attempts": 1, "worker": None,
        "value": 1.0 if state == "done" else None, "curve": None, "checkpoint": None, "adapter_parameters": None,
        "error": None, "updated_at": datetime(2026, 11, 24, tzinfo=UTC), "clone_of": None,
    }  # fmt: skip
    return Job(**fields | spent | more)


def left(jobs: list[Job], spec: StudySpec = SPEC, **more: Any) -> float | None:
    return budgets.seconds_left(spec, jobs, **{"seconds": 100.0, "workers": 1} | more)


def test_the_time_is_that_of_the_steps_that_are_left() -> None:
    waiting = [job(n, state="waiting") for n in range(3, 9)]
    assert left(waiting) is None
    assert left([*map(job, range(3)), *waiting]) == 2 * (WHOLE - 30)
    assert left([*map(job, range(3)), *waiting], workers=2) == WHOLE - 30
    # A variant is on top, while it is open
    assert left([*map(job, range(3)), *waiting, job(9, clone_of=1, state="running")]) == 2 * (WHOLE - 30 + 10)
    assert left([*map(job, range(3)), *waiting, job(9, clone_of=1)]) == 2 * (WHOLE - 30)


def test_however_many_workers_one_trial_goes_through_its_steps_alone() -> None:
    everybody = [*map(job, range(9)), *(job(n, 1) for n in range(3))]
    assert left([*everybody, job(0, 2, "running")], workers=8) == 2 * 60
    # And time goes by until the next rung is done
    assert left([*everybody, job(0, 2, "running")], workers=8, since=50.0) == 2 * 60 - 50
    assert left([*everybody, job(0, 2, "running")], workers=8, since=500.0) == 0


@pytest.mark.parametrize("state", ["failed", "pruned"])
def test_who_failed_or_was_stopped_by_hand_says_nothing_of_the_pace(state: str) -> None:
    jobs = [job(0), job(1), job(2, state=state, seconds=0.1, tokens=1), *(job(n, state="waiting") for n in range(3, 9))]
    assert left(jobs) == 2 * (WHOLE - 30)  # its steps are not made any more


def test_a_search_whose_space_has_no_more_ends_with_what_it_has() -> None:
    assert left([*map(job, range(3)), job(0, 1, "waiting")], begins_more=False) == 2 * (20 + 60)


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [
        ({"max_minutes": 3.0}, 80.0),
        ({"max_training_tokens": 170}, 2 * 4.0),  # four steps more
        ({"max_usd": 0.13}, 30.0),  # a second costs a tenth of a cent
        ({"max_minutes": 3.0, "max_usd": 0.13}, 30.0),
        ({"max_minutes": 1e6, "max_training_tokens": 10**9, "max_usd": 1e6}, 2.0 * (WHOLE - 30)),
        ({"max_minutes": 1.0}, 0.0),
    ],
)
def test_no_longer_than_a_budget_lasts(budget: dict[str, Any], seconds: float) -> None:
    assert left([*map(job, range(3))], replace(SPEC, **budget)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ({"max_minutes": 1.0, "max_usd": 1e-9}, "max_minutes"),
        ({"max_training_tokens": 150}, "max_tokens"),
        ({"max_training_tokens": 151}, None),
        ({"max_usd": 0.1}, "max_usd"),
        ({"max_usd": 0.11}, None),
        ({"max_usd": 1e-9, "machine_usd_per_hour": 0.0}, None),
    ],
)
def test_the_budget_that_is_used_up(budget: dict[str, Any], name: str | None) -> None:
    spec = replace(SPEC, **budget)
    assert budgets.used_up(spec, [*map(job, range(3))], seconds=100.0, workers=1) == name
    assert budgets.used_up(spec, [job(0, state="running")], seconds=100.0, workers=1) is None
