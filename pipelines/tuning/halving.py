"""Successive halving as a function of a study's jobs alone: who stands at a rung, who goes on, how a trial ended.

Drawn trials are halved in the groups they were begun in. A variant that a person asked for comes on top: it is
measured against the group that was begun last before it, and takes nobody's place there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pipelines.tuning.spec import StudySpec, brackets
from registry.studies import Job

Fate = Literal["complete", "pruned", "failed"]
Jobs = Mapping[tuple[int, int], Job]  # (trial, rung) -> job


def groups(spec: StudySpec, jobs: Sequence[Job]) -> list[list[int]]:
    """The drawn trials, group by group; a group that is not begun yet is empty."""
    drawn = sorted({job.trial for job in jobs if job.clone_of is None})
    return [drawn[part.start : part.stop] for part in brackets(spec)]


def standing(spec: StudySpec, by: Jobs, members: Sequence[int], rung: int) -> list[Job] | None:
    """A group's jobs at a rung, once all that came so far are through it; None before."""
    for at in range(rung + 1):
        here = [by[trial, at] for trial in members if (trial, at) in by]
        if len(here) < len(members) or any(job.state in ("waiting", "running") for job in here):
            return None
        if at == rung:
            return here
        members = [job.trial for job in chosen(spec, here)]
    return []


def chosen(spec: StudySpec, here: Sequence[Job]) -> list[Job]:
    """Those that go on to the next rung, the best first: a rung is judged when all its members are through, so that
    the outcome does not depend on who was faster."""
    alive = sorted((job for job in here if job.state == "done" and may_win(spec, job)), key=_rank)
    return alive[: _places(spec, len(here))]


def may_win(spec: StudySpec, job: Job) -> bool:
    """Whether a trial keeps the one constraint that its configuration alone decides."""
    most = spec.constraints.get("adapter_parameters")
    return most is None or (job.adapter_parameters or 0) <= most


def goes_on(spec: StudySpec, jobs: Sequence[Job], variant: Job) -> bool | None:
    """Whether a variant that is done with a rung has a place in the next one; None while that cannot be told."""
    by = by_place(jobs)
    if not may_win(spec, variant):
        return False
    begun = [group for group in groups(spec, jobs) if group]
    home = next((group for group in reversed(begun) if group[0] < variant.trial), begun[0] if begun else [])
    peers = _settled(spec, by, home, variant.rung)
    if peers is None:
        return None
    better = sum(job.state == "done" and _rank(job) < _rank(variant) for job in peers)
    return better < _places(spec, len(peers) + 1)


def fate(spec: StudySpec, jobs: Sequence[Job], trial: int) -> Fate | None:
    """How a trial ended, or None while it may still go on. What is told once stays true."""
    last = max((job for job in jobs if job.trial == trial), key=lambda job: job.rung)
    if last.state in ("waiting", "running"):
        return None
    if last.state == "failed":
        return "failed"
    if last.state == "pruned":
        return "pruned"
    if last.rung == len(spec.rungs) - 1:
        return "complete"
    if last.clone_of is not None:
        return "pruned" if goes_on(spec, jobs, last) is False else None
    group = next(group for group in groups(spec, jobs) if trial in group)
    peers = _settled(spec, by_place(jobs), group, last.rung)
    return "pruned" if peers is not None and last not in chosen(spec, peers) else None


def state(spec: StudySpec, jobs: Sequence[Job], trial: int, *, running: bool) -> str:
    """One word, or three, for where a trial of a study that runs, or does not, is: waiting, running, measured (and not
    yet judged), complete, failed, pruned, or pruned by hand. The console's pages have the same."""
    last = max((job for job in jobs if job.trial == trial), key=lambda job: job.rung)
    if last.state == "pruned":
        return "pruned by hand"
    if ended := fate(spec, jobs, trial):
        return ended
    if last.state == "running":
        return "running"
    return ("waiting" if last.state == "waiting" else "measured") if running else "pruned"


def by_place(jobs: Sequence[Job]) -> dict[tuple[int, int], Job]:
    return {(job.trial, job.rung): job for job in jobs}


def by_trial(jobs: Sequence[Job]) -> dict[int, list[Job]]:
    """A trial's jobs, by rung."""
    found: dict[int, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.trial, []).append(job)
    return found


def last(jobs: Sequence[Job]) -> list[Job]:
    """Each trial's job at its highest rung."""
    return [mine[-1] for mine in by_trial(jobs).values()]


def loss(job: Job) -> float:
    """The validation loss; of a job that has none, one above all others."""
    return float("inf") if job.value is None else job.value


def _settled(spec: StudySpec, by: Jobs, members: Sequence[int], rung: int) -> list[Job] | None:
    """Who stands at a rung, once those that go on were put up: until then a person may take one out."""
    here = standing(spec, by, members, rung)
    if here is None or rung == len(spec.rungs) - 1:
        return here
    return here if all((job.trial, rung + 1) in by for job in chosen(spec, here)) else None


def _places(spec: StudySpec, number: int) -> int:
    return max(1, -(-number // spec.reduction))


def _rank(job: Job) -> tuple[float, int]:
    return (loss(job), job.trial)
