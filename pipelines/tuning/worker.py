"""A search worker: one long-lived process of one thread, which maps the base once and works off rung jobs.

It joins any study from any machine that reaches the database and the artifacts: ``tunesmith worker --study NAME``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from infra import storage
from infra.db import transaction
from infra.errors import Conflict, NotFound, TunesmithError, Unreachable
from pipelines.tuning.spec import StudySpec
from registry import bases, datasets, studies

log = logging.getLogger(__name__)
_IDLE = 0.3  # seconds between looks for work
# Tokens a row. Measured on a CPU in bf16: flash attention's backward pass costs a step 8-17 % more CPU than the plain
# one. Longer rows were not measured, and there the plain one's memory grows with the square.
_EAGER_UP_TO = 512
_DATABASE_AWAY = 120.0  # seconds a worker waits for the database before it gives up


def name_of(pid: int) -> str:
    """A worker's name in `rung_job`."""
    return f"{socket.gethostname()}:{pid}"


def work(study: str, *, max_idle: float | None = None, parent: int | None = None) -> None:
    """Work off a study's jobs until it ends, nothing came up for `max_idle` seconds, or the process `parent` is gone.

    Raises NotFound for no such study, Unreachable when the database stays away.
    """
    with transaction() as conn:
        spec = StudySpec.from_json(studies.get(conn, study)["spec"])
    with contextlib.suppress(OSError):  # rather this process than PostgreSQL, when memory runs out
        Path("/proc/self/oom_score_adj").write_text("500")
    trainer = _trainer(spec)
    idle_since = time.monotonic()
    while parent is None or os.getppid() == parent:
        job = _patiently(lambda: _next(study))
        if job is _OVER:
            return
        if job is None:
            if max_idle is not None and time.monotonic() - idle_since > max_idle:
                return
            time.sleep(_IDLE)
            continue
        _carry_out(trainer, spec, job)
        idle_since = time.monotonic()


_OVER: Any = object()


def _next(study: str) -> Any:
    with transaction() as conn:
        if studies.get(conn, study)["state"] != "running":
            return _OVER
        return studies.claim(conn, study, name_of(os.getpid()))


def _trainer(spec: StudySpec) -> Any:
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
    model = bases.load_model(base.folder, base.dtype)
    if spec.max_tokens <= _EAGER_UP_TO:
        model.set_attn_implementation("eager")
    pad = model.config.pad_token_id if isinstance(model.config.pad_token_id, int) else 0
    return Trainer(model, rows["train"], rows["validation"], pad=pad)


def _carry_out(trainer: Any, spec: StudySpec, job: studies.Job) -> None:
    from pipelines.tuning.trainer import TrialFailed

    log.info("trial %d: to step %d", job.trial, job.steps)
    try:
        with _Hold(job) as hold, storage.scratch("checkpoint") as folder:
            outcome = trainer.run(
                job.params,
                seed=spec.seed * 100_003 + job.trial,
                total_steps=spec.rungs[-1],
                until=job.steps,
                checkpoint=storage.get("checkpoint", job.checkpoint) if job.checkpoint else None,
                init_adapter=Path(spec.init_adapter) if spec.init_adapter else None,
                save_to=folder,
                alive=hold.check,
            )
            digest = storage.folder_digest(folder)
            storage.keep("checkpoint", digest, folder)

        def tell() -> None:
            with transaction() as conn:
                studies.finish(
                    conn,
                    job,
                    value=outcome.value,
                    curve=outcome.curve,
                    checkpoint=digest,
                    tokens=outcome.tokens,
                    seconds=outcome.seconds,
                )

        _patiently(tell)
    except TrialFailed as failure:
        _fail(job, str(failure))
    except Conflict as lost:
        log.warning("%s", lost)
    except Unreachable:
        raise
    except TunesmithError as error:
        _fail(job, error.message)
    except Exception as error:  # whatever it is, the study should say so, and the other trials go on
        log.exception("trial %d", job.trial)
        _fail(job, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}")


def _fail(job: studies.Job, cause: str) -> None:
    log.warning("trial %d failed: %s", job.trial, cause)

    def tell() -> None:
        with transaction() as conn:
            studies.fail(conn, job, cause)

    with contextlib.suppress(Conflict):
        _patiently(tell)


def _patiently(action: Any) -> Any:
    """The action's result, tried again while the database restarts."""
    end = time.monotonic() + _DATABASE_AWAY
    while True:
        try:
            return action()
        except Unreachable:
            if time.monotonic() > end:
                raise
            time.sleep(1)


class _Hold:
    """Renews a job's lease from a thread; `check` raises Conflict once another worker has it."""

    def __init__(self, job: studies.Job) -> None:
        self.job = job
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> _Hold:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def check(self) -> None:
        if self._lost:
            raise Conflict(f"Trial {self.job.trial} went to another worker.")

    def _renew(self) -> None:
        while not self._done.wait(studies.LEASE_SECONDS / 4):
            try:
                with transaction() as conn:
                    studies.renew(conn, self.job)
            except Conflict:
                self._lost = True
                return
            except Exception as error:  # the database may be restarting; the lease outlives some missed renewals
                log.warning("lease not renewed: %s", error)


if __name__ == "__main__":
    from infra import log as logs

    logs.setup()
    try:
        work(sys.argv[1], parent=int(sys.argv[2]) if len(sys.argv) > 2 else None)
    except (NotFound, Unreachable) as problem:
        sys.exit(problem.message)
    except KeyboardInterrupt:
        sys.exit(130)
