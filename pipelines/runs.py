"""A pipeline run: one a model at a time, resumed rather than repeated.

A run holds the lease ``run:<model>``; whatever it writes carries the lease's fencing token, so that a run
that was taken for dead and wakes up later is refused. A stage that finished is kept with its output, and the
same command with the same configuration and data goes on after it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from psycopg.types.json import Jsonb

from infra import processes
from infra.db import Connection, load_queries, transaction
from infra.errors import Conflict
from registry import leases

SQL = load_queries(Path(__file__).with_suffix(".sql"))
LEASE_SECONDS = 60

Kind = Literal["train", "retrain"]


@dataclass(kw_only=True)
class Run:
    """A run under way. `resumed` says that an interrupted run with the same fingerprint goes on."""

    id: uuid.UUID
    model: str
    kind: Kind
    resumed: bool
    keeper: leases.Keeper
    study: str
    previous_flow_run: uuid.UUID | None = None
    mlflow_run_id: str | None = None
    finished: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The output of a stage: what an earlier attempt kept, or what `work` returns, kept before it is returned.

        Raises Conflict when another run has taken the lease meanwhile; the output is then not kept.
        """
        if name not in self.finished:
            begun = time.monotonic()
            output = work()
            with transaction() as conn:
                leases.check(conn, self.keeper.lease)
                conn.execute(
                    SQL["keep_stage"],
                    {"id": self.id, "name": name, "output": Jsonb(output), "seconds": time.monotonic() - begun},
                )
            self.finished[name] = output
        output = self.finished[name]
        return dict(output)

    def note(self, *, study: str | None = None, mlflow_run_id: str | None = None, version: int | None = None) -> None:
        """Keep what later attempts must know before a stage is done."""
        with transaction() as conn:
            leases.check(conn, self.keeper.lease)
            conn.execute(
                SQL["note"], {"id": self.id, "study": study, "mlflow_run_id": mlflow_run_id, "version": version}
            )
        self.mlflow_run_id = mlflow_run_id or self.mlflow_run_id

    def complete(self, result: dict[str, Any]) -> None:
        """The run is done; `result` is what ``run --json`` prints."""
        self._end("completed", result=result)

    def _end(self, state: str, *, error: str | None = None, result: dict[str, Any] | None = None) -> None:
        with transaction() as conn:
            conn.execute(
                SQL["end"],
                {
                    "id": self.id,
                    "state": state,
                    "error": error,
                    "token": self.keeper.lease.token,
                    "result": Jsonb(result) if result else None,
                    "version": result.get("version") if result else None,
                },
            )


@contextmanager
def begin(
    *, model: str, kind: Kind, fingerprint: str, config: dict[str, Any], config_path: str, flow_run_id: uuid.UUID | None
) -> Iterator[Run]:
    """Begin a run, or go on with the last one of the same fingerprint if it did not complete.

    Raises Conflict when another run of the model is in progress. When the block raises, the run ends as failed
    (or cancelled, on an interrupt) with the error's sentence, and can be resumed; the lease is given back.
    """
    with transaction() as conn:
        conn.execute(SQL["ensure_model"], {"model": model})
        _bury(conn, f"run:{model}")
    with ExitStack() as held:
        try:
            keeper = held.enter_context(leases.Keeper(f"run:{model}", leases.this_process(kind), seconds=LEASE_SECONDS))
        except Conflict as error:
            since = f", since {error.details['since']:%Y-%m-%d %H:%M:%S %Z}" if "since" in error.details else ""
            raise Conflict(
                f"Another run of {model} is in progress ({error.details.get('holder', 'just begun')}{since}).",
                hint="Wait for its end, or stop it where it runs: never two runs of one model at a time.",
            ) from error
        run = _open(model, kind, fingerprint, config, config_path, flow_run_id, keeper)
        try:
            yield run
        except Exception as error:
            run._end("failed", error=str(error))
            raise
        except BaseException:  # Ctrl-C, SIGTERM, cancelled in Prefect's page
            run._end("cancelled", error="interrupted")
            raise


def in_progress(model: str) -> str | None:
    """Who runs a pipeline of this model now, in words; None when nobody does."""
    with transaction() as conn:
        _bury(conn, f"run:{model}")
        held = conn.execute(SQL["holder"], {"name": f"run:{model}"}).fetchone()
    return None if held is None else str(held["holder"])


def _bury(conn: Connection, name: str) -> None:
    """Free the lease of a holder that was a process of this machine and is dead, rather than wait it out."""
    held = conn.execute(SQL["holder"], {"name": name}).fetchone()
    if held is not None and processes.is_gone(held["holder"], held["held"]):
        conn.execute(SQL["free"], {"name": name, "token": held["token"]})


def _open(
    model: str,
    kind: Kind,
    fingerprint: str,
    config: dict[str, Any],
    config_path: str,
    flow_run_id: uuid.UUID | None,
    keeper: leases.Keeper,
) -> Run:
    with transaction() as conn:
        earlier = conn.execute(SQL["unfinished"], {"model": model, "kind": kind, "fingerprint": fingerprint}).fetchone()
        if earlier is None:
            run_id = uuid.uuid4()
            conn.execute(
                SQL["begin"],
                {
                    "id": run_id,
                    "model": model,
                    "kind": kind,
                    "fingerprint": fingerprint,
                    "config": Jsonb(config),
                    "config_path": config_path,
                    "token": keeper.lease.token,
                    "flow_run_id": flow_run_id,
                },
            )
            return Run(
                id=run_id, model=model, kind=kind, resumed=False, keeper=keeper, study=f"{model}-{str(run_id)[:8]}"
            )
        conn.execute(SQL["resume"], {"id": earlier["id"], "token": keeper.lease.token, "flow_run_id": flow_run_id})
        stages = {row["name"]: row["output"] for row in conn.execute(SQL["stages"], {"id": earlier["id"]})}
        return Run(
            id=earlier["id"],
            model=model,
            kind=kind,
            resumed=True,
            keeper=keeper,
            study=f"{model}-{str(earlier['id'])[:8]}",
            previous_flow_run=earlier["flow_run_id"],
            mlflow_run_id=earlier["mlflow_run_id"],
            finished=stages,
        )
