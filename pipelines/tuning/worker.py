"""A search worker: one long-lived process of one thread, which maps the base once and works off rung jobs.

It joins any study from any machine that reaches the database and the artifacts: ``tunesmith worker --study NAME``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from infra import storage
from infra.db import transaction
from infra.errors import Conflict, NotFound, StoreError, TunesmithError, Unreachable
from pipelines.tuning import devices, memory
from pipelines.tuning import space as spaces
from pipelines.tuning.latency import Stopwatch
from pipelines.tuning.methods import packable
from pipelines.tuning.outages import patiently
from pipelines.tuning.spec import StudySpec, alone, reaching
from registry import bases, datasets, studies
from registry.halving import brackets

log = logging.getLogger(__name__)
_IDLE = 0.3  # seconds between looks for work
_JUDGED = 1.0  # seconds that a rung's last worker gives the coordinator to judge it, before it takes up lower ones
_LOOK = 1.0  # and between looks whether the work is still wanted
# Tokens a row. Measured on a CPU in bf16: flash attention's backward pass costs a step 8-17 % more CPU than the plain
# one. Longer rows were not measured, and there the plain one's memory grows with the square.
_EAGER_UP_TO = 512
# glibc gives large blocks back to the kernel and takes them anew at every step; page faults cost more than the
# memory is worth. Read by the C library as a process starts.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
_DATABASE_AWAY = 300.0  # seconds a worker waits for the database before it gives up; as long as the coordinator


# What a crew says to its workers, which a guest has not
MARK = "TUNESMITH_CREW_MARK"
SHARING = "TUNESMITH_CREW_SHARING"


def name_of(mark: str, pid: int) -> str:
    """A worker's name in `rung_job`. Containers may have the same host's name and the same process ids, so it has a
    mark drawn at random."""
    return f"{socket.gethostname()}-{mark}:{pid}"


def _my_name() -> str:
    return name_of(os.environ.setdefault(MARK, secrets.token_hex(4)), os.getpid())  # the same when it begins anew


def work(study: str, *, max_idle: float | None = None, parent: int | None = None) -> None:
    """Work off a study's jobs until it ends, nothing came up for `max_idle` seconds, or the process `parent` is gone.
    Without a parent, a guest: what does not fit into its machine's memory is left to the others.

    Raises NotFound for no such study, Unreachable when the database stays away, TunesmithError when the artifacts
    cannot be read or take no more; what it was at then waits again.
    """
    with transaction() as conn:
        spec = StudySpec.from_json(studies.get(conn, study)["spec"])
    with contextlib.suppress(OSError):  # rather this process than PostgreSQL, when memory runs out
        Path("/proc/self/oom_score_adj").write_text("500")
    trainer = make_trainer(spec)
    if spec.weighs("latency_ms"):
        trainer.stopwatch = Stopwatch(trainer.model, bases.load(spec.base), trainer.validation.row(0).tolist())
    patiently(lambda: _measure(trainer, spec), _DATABASE_AWAY)
    idle_since = time.monotonic()
    too_large: set[int] = set()  # trials that a guest leaves to others
    rung, rung_until = -1, 0.0
    while parent is None or os.getppid() == parent:
        judging = time.monotonic() < rung_until
        look = partial(_next, study, too_large, above=rung if judging else -1)
        jobs = patiently(look, _DATABASE_AWAY)
        if jobs is None:
            return
        if not jobs:
            if not judging and max_idle is not None and time.monotonic() - idle_since > max_idle:
                return
            time.sleep(_IDLE / 3 if judging else _IDLE)
            continue
        too_large.update(_carry_out(trainer, spec, jobs, guest=parent is None))
        if trainer.broken:  # and this process may have all the memory that it is allowed
            log.warning("the worker begins anew, since an adapter was half-made on its base")
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
        idle_since = time.monotonic()
        rung, rung_until = jobs[0].rung, idle_since + (_JUDGED if jobs[0].rung + 1 < len(spec.rungs) else 0.0)


def _next(study: str, without: Collection[int], above: int) -> list[studies.Job] | None:
    """A pack to work off, but for some trials; empty when there is none now, None when the study is over. Once the rung
    `above` is over, none of it or of lower ones: a trial that is to end first would wait behind those that begin."""
    with transaction() as conn:
        if studies.get(conn, study)["state"] != "running":
            return None
        if above >= 0 and not studies.rung_is_over(conn, study, above):
            above = -1
        return studies.claim(conn, study, _my_name(), without=without, above=above)


def _places(study: str) -> dict[int, int]:
    with transaction() as conn:
        return studies.places(conn, study)


def _measure(trainer: Any, spec: StudySpec) -> None:
    """Unless it is known, find out how many adapters to train in one pass."""
    if spec.adapters_per_pass:
        return
    with transaction() as conn:
        if studies.get(conn, spec.study)["adapters_per_pass"] is not None:
            return
    workers = max(1, spec.workers)
    steps = sum(count * alone(spec, rung) for rung, count in enumerate(reaching(spec))) // workers
    most = -(-len(brackets(spec)[0]) // workers)  # of a larger pack a part would go to an idle worker
    best = trainer.best_pack(spaces.typical(spec.space, packable), most=most, steps=steps)
    with transaction() as conn:
        studies.measured(conn, spec.study, best)


def make_trainer(spec: StudySpec) -> Any:
    """The trainer of a study's base and rows, on this process's device and within its share of memory."""
    import torch
    from transformers.utils import logging as transformers_logging

    from pipelines.data.tokenise import tokenised
    from pipelines.tuning.trainer import Trainer

    torch.set_num_threads(1)  # with two, any busy neighbour stalls every step
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers speak to each other's authors
    base = bases.load(spec.base)
    dataset = datasets.open_dataset(spec.dataset)
    rows = {
        split: tokenised(dataset, split, base, max_tokens=spec.max_tokens, system=spec.system)
        for split in ("train", "validation")
    }
    if spec.validation_rows is not None:
        rows["validation"] = rows["validation"].sample(spec.validation_rows, spec.seed)
    device = devices.mine()
    model = bases.load_model(base.folder, base.dtype).to(device)
    if device == "cpu" and spec.max_tokens <= _EAGER_UP_TO:
        model.set_attn_implementation("eager")
    pad = model.config.pad_token_id if isinstance(model.config.pad_token_id, int) else 0
    room = memory.share(int(os.environ.get(SHARING, "1")), device)
    trainer = Trainer(model, rows["train"], rows["validation"], pad=pad, seed=spec.seed, room=room)
    memory.confine(room, device)
    return trainer


def _carry_out(trainer: Any, spec: StudySpec, jobs: Sequence[studies.Job], *, guest: bool) -> set[int]:
    """Train a pack, and tell what became of each of its jobs. Returns the trials that are too large for a guest, and
    wait for another worker."""
    from pipelines.tuning.trainer import PackTooLarge, TrialFailed

    left: set[int] = set()
    log.info("trials %s: to step %d", ", ".join(str(job.trial) for job in jobs), jobs[0].steps)
    try:
        starts = [_start(job) for job in jobs]
        if len(jobs) > 1 and any(job.checkpoint and start is None for job, start in zip(jobs, starts, strict=True)):
            _write([_Result(job, studies.unpack) for job in jobs])  # a pack's members stand at one step
            return left
        with _Hold(jobs) as hold, contextlib.ExitStack() as folders:
            places = patiently(lambda: _places(spec.study), _DATABASE_AWAY)
            members = [
                _member(spec, job, places[job.trial], start, folders.enter_context(storage.scratch("checkpoint")))
                for job, start in zip(jobs, starts, strict=True)
            ]
            outcomes = trainer.run(members, total_steps=spec.rungs[-1], until=jobs[0].steps, lost=hold.lost)
            results: list[_Result] = []
            for job, member, outcome in zip(jobs, members, outcomes, strict=True):
                if guest and isinstance(outcome, TrialFailed) and outcome.too_large:
                    log.warning("trial %d is left to other workers: %s", job.trial, outcome)
                    results.append(_Result(job, studies.unpack))
                    left.add(job.trial)
                elif isinstance(outcome, TrialFailed):
                    results.append(_failed(job, str(outcome), tokens=outcome.tokens, seconds=outcome.seconds))
                elif outcome is not None:
                    begun = spec.rungs[job.rung - 1] if job.rung else 0
                    latency = _latency(trainer, member.save_to / "adapter")
                    results.append(_done(job, begun, outcome, member.save_to, latency))
            _write(results)  # all or none: a part of a pack that is trained again has other company
    except PackTooLarge as error:
        if guest:  # others may have room for all of it
            log.warning("%s; they are left to other workers", error)
            with transaction() as conn:
                studies.give_back(conn, spec.study, _my_name())
            return {job.pack for job in jobs}
        log.warning("%s; each is tried alone", error)
        _write([_Result(job, studies.unpack) for job in jobs])
    except Conflict as lost:
        log.warning("%s", lost)
    except Unreachable:
        raise
    except (StoreError, OSError) as error:  # of the artifacts: no trial's fault, and what is in the way of all
        with transaction() as conn:
            studies.give_back(conn, spec.study, _my_name())
        if isinstance(error, TunesmithError):
            raise
        raise TunesmithError(f"The artifacts cannot be read or written: {error}.") from error
    except TunesmithError as error:
        if isinstance(error, NotFound) and not storage.root().is_dir():  # they are not mounted here
            with transaction() as conn:
                studies.give_back(conn, spec.study, _my_name())
            raise
        _write([_failed(job, error.message) for job in jobs])
    except Exception as error:  # whatever it is, the study should say so, and the other trials go on
        log.exception("trial %d", jobs[0].trial)
        if len(jobs) > 1:  # whose fault it is shows when each is tried alone
            _write([_Result(job, studies.unpack) for job in jobs])
            return left
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        _write([_failed(job, why) for job in jobs])
    return left


def _start(job: studies.Job) -> Path | None:
    """Where a job goes on from: its checkpoint, or the beginning where that is damaged or gone, since the way from
    there is the same. Raises NotFound when no artifacts are here at all."""
    if job.checkpoint is None:
        return None
    if not storage.root().is_dir() or storage.sound("checkpoint", job.checkpoint):
        return storage.get("checkpoint", job.checkpoint)
    log.warning("trial %d begins anew: its checkpoint %s is damaged or gone", job.trial, job.checkpoint)
    return None


def _member(spec: StudySpec, job: studies.Job, place: int, start: Path | None, folder: Path) -> Any:
    from pipelines.tuning.trainer import Member

    return Member(
        params=job.params,
        seed=spec.trial_seed(place),
        start=start,
        init_adapter=spec.init_adapter(),
        save_to=folder,
    )


def _latency(trainer: Any, adapter: Path) -> float | None:
    """None where it is not weighed, and of an adapter that no engine takes."""
    if trainer.stopwatch is None:
        return None
    try:
        return float(trainer.stopwatch.milliseconds(adapter))
    except TunesmithError as error:
        log.warning("the latency of an adapter is not known: %s", error.message)
        return None


@dataclass(frozen=True)
class _Result:
    """What became of a job, to be written by `how`."""

    job: studies.Job
    how: Callable[..., None]
    values: Mapping[str, object] = field(default_factory=dict)


def _done(job: studies.Job, begun: int, outcome: Any, folder: Path, latency_ms: float | None) -> _Result:
    """What a rung came to, with its own steps' losses, those after `begun`."""
    digest = storage.folder_digest(folder)
    if storage.has("checkpoint", digest) and not storage.sound("checkpoint", digest):
        storage.remove("checkpoint", digest)  # the same training was here before, and what it left is damaged
    storage.keep("checkpoint", digest, folder)
    values = {
        "value": outcome.value,
        "curve": [point for point in outcome.curve if point[0] > begun],
        "checkpoint": digest,
        "tokens": outcome.tokens,
    }
    values |= {"seconds": outcome.seconds, "adapter_parameters": outcome.adapter_parameters, "latency_ms": latency_ms}
    return _Result(job, studies.finish, values)


def _failed(job: studies.Job, cause: str, *, tokens: int = 0, seconds: float = 0.0) -> _Result:
    log.warning("trial %d failed: %s", job.trial, cause)
    return _Result(job, studies.fail, {"error": cause, "tokens": tokens, "seconds": seconds})


def _write(results: Sequence[_Result]) -> None:
    """Write what became of jobs in one transaction, but for those that went to another worker."""

    def tell() -> None:
        with transaction() as conn:
            for result in results:
                try:
                    with conn.transaction():
                        result.how(conn, result.job, **result.values)
                except Conflict as lost:
                    log.warning("%s", lost)

    patiently(tell, _DATABASE_AWAY)


class _Hold:
    """Renews jobs' leases from a thread, and looks once a second whether they still hold; `lost` tells which of them
    went to another worker, or were pruned by hand."""

    def __init__(self, jobs: Sequence[studies.Job]) -> None:
        self.jobs = jobs
        self._lost: set[int] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> _Hold:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def lost(self) -> set[int]:
        """Places of jobs that are no longer ours. Raises Conflict when all are not."""
        if len(self._lost) == len(self.jobs):
            raise Conflict(f"Trial {self.jobs[0].trial} went to another worker, or was pruned.")
        return set(self._lost)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._done.wait(_LOOK):
            due = time.monotonic() - renewed > studies.LEASE_SECONDS / 4
            renewed = time.monotonic() if due else renewed
            for place, job in enumerate(self.jobs):
                if place in self._lost:
                    continue
                try:
                    with transaction() as conn:
                        (studies.renew if due else studies.check)(conn, job)
                except Conflict:
                    self._lost.add(place)
                except Exception as error:  # the database may be restarting; the lease outlives some missed renewals
                    log.warning("lease not renewed: %s", error)


if __name__ == "__main__":
    from infra import log as logs

    logs.setup()
    try:
        work(sys.argv[1], parent=int(sys.argv[2]) if len(sys.argv) > 2 else None)
    except TunesmithError as problem:
        sys.exit(problem.message)
    except KeyboardInterrupt:
        sys.exit(130)
