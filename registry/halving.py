"""Successive halving as a function of a study's jobs alone: who stands at a rung, who goes on, how a trial ended.

Drawn trials are halved in the groups they were begun in. A variant that a person asked for comes on top: it is
measured against the group that was begun last before it, and takes nobody's place there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.studies import Job

Fate = Literal["complete", "pruned", "failed"]
Jobs = Mapping[tuple[int, int], Job]  # (trial, rung) -> job


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a study's spec decides who goes on. `rungs` are the optimizer steps at which trials are compared, the
    last being the whole of a trial; after each rung but the last, the best 1/`reduction` of a group go on, and no fewer
    than `finalists`."""

    trials: int
    rungs: tuple[int, ...]
    reduction: int
    finalists: int = 1
    workers: int = 0
    constraints: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Plan:
        """The plan in `study.spec`."""
        found = {name: spec[name] for name in Plan.__dataclass_fields__ if name in spec}
        return Plan(**found | {"rungs": tuple(spec["rungs"])})


def brackets(plan: Plan) -> list[range]:
    """Places of trials in groups that are begun together, each as large as it takes for one of them to reach the last
    rung and for no worker to be idle; a group's configurations are drawn with what earlier groups showed."""
    size = max(plan.reduction ** (len(plan.rungs) - 1), plan.workers, 1)
    return [range(start, min(start + size, plan.trials)) for start in range(0, plan.trials, size)]


def groups(plan: Plan, jobs: Sequence[Job]) -> list[list[int]]:
    """The drawn trials, group by group; a group that is not begun yet is empty."""
    drawn = sorted({job.trial for job in jobs if job.clone_of is None})
    return [drawn[part.start : part.stop] for part in brackets(plan)]


def standing(plan: Plan, by: Jobs, members: Sequence[int], rung: int) -> list[Job] | None:
    """A group's jobs at a rung, once all that came so far are through it; None before."""
    for at in range(rung + 1):
        here = [by[trial, at] for trial in members if (trial, at) in by]
        if len(here) < len(members) or any(job.state in ("waiting", "running") for job in here):
            return None
        if at == rung:
            return here
        members = [job.trial for job in chosen(plan, here)]
    return []


def chosen(plan: Plan, here: Sequence[Job]) -> list[Job]:
    """Those that go on to the next rung, the best first: a rung is judged when all its members are through, so that
    the outcome does not depend on who was faster."""
    alive = sorted((job for job in here if job.state == "done" and may_win(plan, job)), key=_rank)
    return alive[: places(plan, len(here))]


def may_win(plan: Plan, job: Job) -> bool:
    """Whether a trial keeps the one constraint that its configuration alone decides."""
    most = plan.constraints.get("adapter_parameters")
    return most is None or (job.adapter_parameters or 0) <= most


def goes_on(plan: Plan, jobs: Sequence[Job], variant: Job) -> bool | None:
    """Whether a variant that is done with a rung has a place in the next one; None while that cannot be told."""
    by = by_place(jobs)
    if not may_win(plan, variant):
        return False
    begun = [group for group in groups(plan, jobs) if group]
    home = next((group for group in reversed(begun) if group[0] < variant.trial), begun[0] if begun else [])
    peers = _settled(plan, by, home, variant.rung)
    if peers is None:
        return None
    better = sum(job.state == "done" and _rank(job) < _rank(variant) for job in peers)
    return better < places(plan, len(peers) + 1)


def fates(plan: Plan, jobs: Sequence[Job]) -> dict[int, Fate | None]:
    """How each trial ended, or None while it may still go on. What is told once stays true."""
    by = by_place(jobs)
    home = {trial: group for group in groups(plan, jobs) for trial in group}
    return {job.trial: _fate(plan, jobs, by, job, home.get(job.trial, [])) for job in last(jobs)}


def _fate(plan: Plan, jobs: Sequence[Job], by: Jobs, job: Job, group: Sequence[int]) -> Fate | None:
    """Of the trial whose last job this is."""
    if job.state in ("waiting", "running"):
        return None
    if job.state == "failed":
        return "failed"
    if job.state == "pruned":
        return "pruned"
    if job.rung == len(plan.rungs) - 1:
        return "complete"
    if job.clone_of is not None:
        return "pruned" if goes_on(plan, jobs, job) is False else None
    peers = _settled(plan, by, group, job.rung)
    return "pruned" if peers is not None and job not in chosen(plan, peers) else None


def states(plan: Plan, jobs: Sequence[Job], *, running: bool) -> dict[int, str]:
    """One word, or three, for where each trial of a study that runs, or does not, is: waiting, running, measured (and
    not yet judged), complete, failed, pruned, or pruned by hand."""
    fate, found = fates(plan, jobs), {}
    for job in last(jobs):
        if job.state == "pruned":
            found[job.trial] = "pruned by hand"
        elif (ended := fate[job.trial]) is not None:
            found[job.trial] = ended
        elif job.state == "running":
            found[job.trial] = "running"
        else:
            found[job.trial] = ("waiting" if job.state == "waiting" else "measured") if running else "pruned"
    return found


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


def _settled(plan: Plan, by: Jobs, members: Sequence[int], rung: int) -> list[Job] | None:
    """Who stands at a rung, once those that go on were put up: until then a person may take one out."""
    here = standing(plan, by, members, rung)
    if here is None or rung == len(plan.rungs) - 1:
        return here
    return here if all((job.trial, rung + 1) in by for job in chosen(plan, here)) else None


def places(plan: Plan, number: int) -> int:
    """How many of so many trials at a rung go on."""
    return max(min(plan.finalists, number), -(-number // plan.reduction))


def _rank(job: Job) -> tuple[float, int]:
    return (loss(job), job.trial)
