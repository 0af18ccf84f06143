"""Studies and their rung jobs: what a search has begun, who works on it, what came out.

A rung job is one trial trained up to one number of steps. Jobs that are to train in one pass form a pack, which is
claimed as a whole. Workers claim under a lease on the database's clock; each claim raises the jobs' tokens, and every
write names them, so that a worker that was taken for dead cannot overwrite its successor's result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries, one
from infra.errors import Conflict, NotFound

SQL = load_queries(Path(__file__).with_suffix(".sql"))
LEASE_SECONDS = 30.0
MOST_DEATHS = 3  # of a job's workers, until it fails
MOST_ATTEMPTS = 10  # and times that it was taken: it may be what kills the machine


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row of `rung_job`. `value` is the validation loss at `steps` steps, `curve` [[step, training loss], ...];
    `pack` is the number of the trial that leads those it trains beside, its own when it trains alone;
    `clone_of` is the trial that a person had this variant made of; `attempts` is how often a worker took it and did not
    give it back."""

    study: str
    trial: int
    rung: int
    trial_id: int
    params: dict[str, Any]
    steps: int
    pack: int
    state: str
    token: int
    attempts: int
    worker: str | None
    value: float | None
    curve: list[list[float]] | None
    checkpoint: str | None
    tokens: int | None
    seconds: float | None
    adapter_parameters: int | None
    latency_ms: float | None = None
    error: str | None
    updated_at: datetime
    clone_of: int | None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration that a person asked for: a variant of a trial. `trial` is the one it was begun as, or None."""

    number: int
    clone_of: int
    params: dict[str, Any]
    trial: int | None


def create(conn: Connection, name: str, model: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Begin a study, or find the one of this name; returns its row, whose `spec` is the one that holds."""
    conn.execute(SQL["create"], {"name": name, "model": model, "spec": Jsonb(dict(spec))})
    return get(conn, name)


def get(conn: Connection, name: str) -> dict[str, Any]:
    """A study's row. Raises NotFound."""
    row = conn.execute(SQL["get"], {"name": name}).fetchone()
    if row is None:
        raise NotFound(f"There is no study {name}.", hint="See `tunesmith study list`.")
    return dict(row)


def lock(conn: Connection, name: str) -> dict[str, Any]:
    """A study's row, held until the transaction ends, so that what a person asks for and what the coordinator puts up
    or ends come one after the other. Raises NotFound."""
    row = conn.execute(SQL["lock"], {"name": name}).fetchone()
    return get(conn, name) if row is None else dict(row)


def list_studies(conn: Connection) -> list[dict[str, Any]]:
    """All studies, newest first, with counts of trials and of rungs done and open, the least loss so far, and whether
    their run is at work."""
    return list(conn.execute(SQL["list"]))


def at_work(conn: Connection, name: str) -> bool:
    """Whether the run that searches is there."""
    row = conn.execute(SQL["at_work"], {"name": name}).fetchone()
    return bool(row and row["at_work"])


def end(conn: Connection, name: str, *, state: str, stopped_by: str | None, best: Mapping[str, Any] | None) -> None:
    """Say how a study ended; saying it again is harmless."""
    values = {"name": name, "state": state, "stopped_by": stopped_by, "best": Jsonb(dict(best)) if best else None}
    conn.execute(SQL["end"], values)


def stop(conn: Connection, name: str, *, by: str = "user") -> None:
    """Have a running study end with what it has, by a budget of that name or by a person: workers finish their rung and
    claim no other. Raises NotFound, Conflict when it is not running."""
    row = get(conn, name)
    values = {"name": name, "state": "stopped", "stopped_by": by, "from": ["running"]}
    if conn.execute(SQL["set_state"], values).fetchone() is None:
        raise Conflict(f"The study {name} is {row['state']} already.")


def resume(conn: Connection, name: str) -> None:
    """Let a stopped or failed study go on, and forget how it ended, and what its run made of it; the run that owns it
    does the rest. Trials of a failed one, in which none succeeded, are tried anew.

    Raises NotFound, Conflict when it is neither, when its run is at work on what was found, or has registered it, and
    when it used up a budget, which is its own for good.
    """
    conn.execute(SQL["hold_lease"], {"name": name})
    row = lock(conn, name)
    if row["state"] == "stopped" and str(row["stopped_by"]).startswith("max_"):
        raise Conflict(
            f"The study {name} used up its {row['stopped_by']}, and would stop again at once.",
            hint="Raise tuning.budget in the file and run it again: that search begins with what this one found best.",
        )
    run = conn.execute(SQL["its_run"], {"name": name}).fetchone()
    # Between the search's result and the run's own note of it there are some seconds
    found = row["best"] is not None or (run is not None and run["searched"])
    if run is not None and found and row["state"] == "stopped":
        if run["version"] is not None or run["at_work"]:
            has = (
                f"has made version {run['version']} of it" if run["version"] is not None else "is at work on a version"
            )
            raise Conflict(
                f"The study {name} is {row['state']}, and its run {has}, or was a minute ago.",
                hint="Run the pipeline again for another search, which begins with what this one found best.",
            )
        conn.execute(SQL["search_again"], {"run": run["id"]})
    values = {"name": name, "state": "running", "stopped_by": None, "from": ["stopped", "failed"]}
    if conn.execute(SQL["set_state"], values).fetchone() is None:
        raise Conflict(f"The study {name} is {row['state']}, and no run is left to go on with it.")
    if row["state"] == "failed":
        conn.execute(SQL["reopen"], {"name": name})


def spoil(conn: Connection, job: Job, *, error: str) -> None:
    """A rung that was done is one that failed, since what it left is damaged: nothing goes on from it or wins by it."""
    conn.execute(SQL["spoil"], {"study": job.study, "trial": job.trial, "rung": job.rung, "error": error})


def jobs(conn: Connection, study: str, *, curves: bool = False) -> list[Job]:
    """All jobs of a study, by trial and rung; their curves are None unless asked for."""
    return [_job(row) for row in conn.execute(SQL["jobs"], {"study": study, "curves": curves})]


def curves(conn: Connection, study: str, jobs: Sequence[Job]) -> dict[tuple[int, int], list[list[float]]]:
    """The curves of some jobs, by trial and rung."""
    wanted = {"trials": [job.trial for job in jobs], "rungs": [job.rung for job in jobs]}
    rows = conn.execute(SQL["curves"], {"study": study} | wanted)
    return {(row["trial"], row["rung"]): row["curve"] or [] for row in rows}


def places(conn: Connection, study: str) -> dict[int, int]:
    """Each trial's place among those that were drawn, from 0: its number may be higher, by what a person had tried in
    between. A variant has that of the trial it is of."""
    found: dict[int, int] = {}
    drawn = 0
    for row in conn.execute(SQL["begun"], {"study": study}):
        if row["clone_of"] is None:
            found[row["trial"]] = drawn
            drawn += 1
        else:  # whose number is lower
            found[row["trial"]] = found[row["clone_of"]]
    return found


def checkpoints(conn: Connection, study: str) -> list[str]:
    """Digests of the checkpoints that no other study's jobs have."""
    return [row["checkpoint"] for row in conn.execute(SQL["checkpoints"], {"study": study})]


def add_job(
    conn: Connection, study: str, *, trial: int, rung: int, trial_id: int, params: Mapping[str, Any], steps: int,
    checkpoint: str | None, pack: int | None = None, clone_of: int | None = None,
) -> None:  # fmt: skip
    """Put a rung up for work, to go on from a checkpoint; no-op when it is there, or the trial was pruned by hand."""
    lock(conn, study)
    values = {"study": study, "trial": trial, "rung": rung, "trial_id": trial_id, "steps": steps, "clone_of": clone_of}
    values |= {"params": Jsonb(dict(params)), "checkpoint": checkpoint, "pack": trial if pack is None else pack}
    conn.execute(SQL["add_job"], values)


def claim(
    conn: Connection, study: str, worker: str, *, seconds: float = LEASE_SECONDS, without: Collection[int] = (),
    above: int = -1,
) -> list[Job]:  # fmt: skip
    """Take the waiting jobs of a pack, variants first, then higher rungs, by trial; none that a trial of `without`
    leads, and only of rungs beyond `above`. Empty when there is none, or the study does not run."""
    values = {"study": study, "worker": worker, "seconds": seconds, "without": list(without), "above": above}
    return sorted((_job(row) for row in conn.execute(SQL["claim"], values)), key=lambda job: job.trial)


def rung_is_over(conn: Connection, study: str, rung: int) -> bool:
    """Whether no job of a rung waits or runs."""
    return bool(one(conn, SQL["rung_is_over"], {"study": study, "rung": rung})["over"])


def unpack(conn: Connection, job: Job) -> None:
    """A job that does not fit beside its pack's others waits again, to train alone; the attempt does not count.

    Raises Conflict when the job went to another worker.
    """
    _held(conn.execute(SQL["unpack"], _key(job)).fetchone(), job)


def went_on(conn: Connection, name: str, seconds: float, *, left: float | None = None) -> None:
    """Count time that a study was at work, and say how much it takes yet."""
    conn.execute(SQL["went_on"], {"name": name, "seconds": seconds, "left": left})


def measured(conn: Connection, name: str, adapters_per_pass: int) -> None:
    """Keep what a worker measured; the first one's figure holds for the whole study."""
    conn.execute(SQL["measured"], {"name": name, "number": adapters_per_pass})


def renew(conn: Connection, job: Job, *, seconds: float = LEASE_SECONDS) -> None:
    """Hold on to a job, also to one whose lease ran out unnoticed. Raises Conflict when it was taken away."""
    _held(conn.execute(SQL["renew"], _key(job) | {"seconds": seconds}).fetchone(), job)


def check(conn: Connection, job: Job) -> None:
    """Raises Conflict when the job is not this worker's any more."""
    _held(conn.execute(SQL["check"], _key(job)).fetchone(), job)


def finish(
    conn: Connection, job: Job, *, value: float, curve: Sequence[Sequence[float]], checkpoint: str, tokens: int,
    seconds: float, adapter_parameters: int, latency_ms: float | None = None,
) -> None:  # fmt: skip
    """A rung's result. Raises Conflict when the job went to another worker; nothing is then written."""
    values: dict[str, Any] = {"value": value, "curve": Jsonb([list(p) for p in curve]), "checkpoint": checkpoint}
    values |= {"tokens": tokens, "seconds": seconds, "adapter_parameters": adapter_parameters}
    values |= {"latency_ms": latency_ms}
    _held(conn.execute(SQL["finish"], _key(job) | values).fetchone(), job)


def fail(conn: Connection, job: Job, error: str, *, tokens: int = 0, seconds: float = 0.0) -> None:
    """A rung that cannot succeed, with its cause, and what it cost. Raises Conflict when the job went to another
    worker."""
    values = {"error": error, "tokens": tokens, "seconds": seconds}
    _held(conn.execute(SQL["fail"], _key(job) | values).fetchone(), job)


def prune(conn: Connection, job: Job) -> None:
    """End a trial at its last job, whatever that is at; its worker's token holds no longer. In the study's `lock`."""
    conn.execute(SQL["prune"], _key(job))


def variants(conn: Connection, study: str) -> list[Variant]:
    """What was asked for, in that order, begun or not."""
    return [Variant(**row) for row in conn.execute(SQL["variants"], {"study": study})]


def ask_variant(conn: Connection, study: str, *, clone_of: int, params: Mapping[str, Any]) -> None:
    """Have a configuration tried as soon as a worker is free. In the study's `lock`."""
    conn.execute(SQL["ask_variant"], {"study": study, "clone_of": clone_of, "params": Jsonb(dict(params))})


def variant_begun(conn: Connection, study: str, variant: Variant, trial: int) -> None:
    """Say which trial a variant became."""
    conn.execute(SQL["variant_begun"], {"study": study, "number": variant.number, "trial": trial})


def bury(conn: Connection, study: str, worker: str) -> None:
    """The worker is known to have died by itself: its jobs wait again, from their last checkpoint, alone from the
    second time on, or fail after the deaths that are allowed. Only who would have gone with its machine can know."""
    conn.execute(SQL["bury"], {"study": study, "worker": worker, "deaths": MOST_DEATHS})


def give_back(conn: Connection, study: str, worker: str) -> None:
    """The worker was ended on purpose: its jobs wait again, and the attempt does not count against them."""
    conn.execute(SQL["give_back"], {"study": study, "worker": worker})


def reap(conn: Connection, study: str) -> None:
    """Jobs whose lease ran out wait again, from their last checkpoint; after half of the attempts that are allowed
    alone, and after all of them they fail.

    For the coordinator alone: workers never take from each other. After an outage of the database, in which nobody
    could renew, it must wait for the length of a lease first.
    """
    conn.execute(SQL["reap"], {"study": study, "attempts": MOST_ATTEMPTS})


def _key(job: Job) -> dict[str, Any]:
    return {"study": job.study, "trial": job.trial, "rung": job.rung, "token": job.token}


def _held(row: Any, job: Job) -> None:
    if row is None:
        raise Conflict(f"Rung {job.rung} of trial {job.trial} of {job.study} went to another worker, or was pruned.")


def _job(row: Mapping[str, Any]) -> Job:
    return Job(**{name: row[name] for name in Job.__dataclass_fields__})
