"""What a search may spend: the budget that is used up, and the time that is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from infra.settings import get_settings
from pipelines.tuning.spec import StudySpec, alone, reaching
from registry.halving import brackets
from registry.studies import Job


def used_up(spec: StudySpec, jobs: Sequence[Job], *, seconds: float, workers: int) -> str | None:
    """The budget that is used up, when the search has gone on for so many seconds: minutes of that time, tokens trained
    on (also by trials that failed), or what machines cost that were at work for all of it, more of them where guests
    help. None before a trial has come to anything, since a search ends with what it has."""
    if not any(job.state in ("done", "failed") for job in jobs):
        return None
    return next((name for name, left in _left(spec, jobs, seconds, workers) if left <= 0), None)


def seconds_left(
    spec: StudySpec, jobs: Sequence[Job], *, seconds: float, workers: int, begins_more: bool = True, since: float = 0.0
) -> float | None:
    """How long the search takes yet, until it is through or a budget is used up, by what a step and a token took in
    rungs that were done, `since` seconds ago; None before there is one. It takes at least as long as one trial takes to
    go from where the last group is to the last rung, however many workers there are. Unless it `begins_more`, no
    further trials are drawn."""
    done = [job for job in jobs if job.state == "done"]
    spent, worked = sum(job.seconds or 0.0 for job in done), sum(alone(spec, job.rung) for job in done)
    if not worked:
        return None
    if not begins_more:
        spec = replace(spec, trials=len({job.trial for job in jobs if job.clone_of is None}))
    planned = sum(alone(spec, rung) * count for rung, count in enumerate(reaching(spec)))
    variants = sum(alone(spec, job.rung) for job in jobs if job.clone_of is not None and _is_open(job))
    over = sum(alone(spec, job.rung) for job in jobs if job.clone_of is None and not _is_open(job))
    steps = max(0, planned - over) + variants
    drawn = {job.trial for job in jobs if job.clone_of is None}
    alone_yet = spec.rungs[-1] if steps else 0
    if len(drawn) >= spec.trials:
        last = sorted(drawn)[brackets(spec)[-1].start :]
        reached = [spec.rungs[job.rung] for job in jobs if job.trial in last and not _is_open(job)]
        alone_yet -= min(alone_yet, max(reached, default=0))
    budgets = [left for _, left in _left(spec, jobs, seconds, workers)]
    pace = spent / worked
    return max(0.0, min([pace * max(steps / workers, alone_yet) - since, *budgets]))


def _is_open(job: Job) -> bool:
    return job.state in ("waiting", "running")


def _left(spec: StudySpec, jobs: Sequence[Job], seconds: float, workers: int) -> Iterator[tuple[str, float]]:
    """Each budget with the seconds until it is used up."""
    if spec.max_minutes is not None:
        yield "max_minutes", spec.max_minutes * 60 - seconds
    if spec.max_training_tokens is not None:
        left = spec.max_training_tokens - sum(job.tokens or 0 for job in jobs)
        done = [job for job in jobs if job.state == "done"]
        each = sum(job.seconds or 0.0 for job in done) / max(1, sum(job.tokens or 0 for job in done))
        yield "max_tokens", left * (each or 1.0) / workers  # only its sign counts before a rung is done
    hourly = get_settings().machine_usd_per_hour if spec.machine_usd_per_hour is None else spec.machine_usd_per_hour
    if spec.max_usd is not None and hourly > 0:
        at_work = max(seconds, sum(job.seconds or 0.0 for job in jobs) / workers)
        yield "max_usd", spec.max_usd / hourly * 3600 - at_work
