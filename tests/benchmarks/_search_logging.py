"""Part (d) of search.py: what logging costs a study."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from _home import started
from _search_bench import ONE, Bench, median, print_ratio, say, say_json

from infra import ports, services
from infra.db import transaction
from infra.settings import get_settings
from pipelines.tuning.mirror import Mirror
from pipelines.tuning.spec import StudySpec, rungs
from registry import studies

WAYS = ("ours", "log_metric", "asynchronous", "buffered", "log_batch")
MINUTES = ("log_metric", "asynchronous")  # take minutes a round, and part in every other one


def compare_logging(bench: Bench) -> None:
    """A study's curves in MLflow, by our way and by MLflow's own, each read back through MLflow's API."""
    size = bench.size
    curves = [[4.0 / (1 + n + step / 100) for step in range(size.logged_steps)] for n in range(size.logged_trials)]
    found: dict[str, dict[int, dict[str, float]]] = {way: {} for way in WAYS}
    with mlflow_server(bench):
        for number in range(size.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                if number % 2 and way in MINUTES:
                    continue
                job = {"experiment": f"{way}-{number}", "way": way, "curves": curves, "params": ONE}
                begun, ended = bench.ours("log", job) if way == "ours" else bench.peer("log", job)
                check_that_all_is_there(job["experiment"], curves)
                seconds, cpu = ended["at"] - begun["at"], bench.meter.between(begun["at"], ended["at"])
                found[way][number] = {"wall": seconds, "cpu": cpu}
                say(f"  round {number} {way}: {seconds:.2f} s, {cpu:.2f} CPU s, all points are there")
    print(f"\n(d) Logging: {size.logged_trials} trials x {size.logged_steps} steps, until all is visible in MLflow "
          "(one server process on PostgreSQL; CPU of client, server and database)")  # fmt: skip
    print("    asynchronous and buffered: log_metric(synchronous=False) and a flush, the latter with "
          "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS=1; log_batch: one call a trial, ours one a trial and rung, four at "
          "once")  # fmt: skip
    for way in WAYS:
        rounds = list(found[way].values())
        print(f"    {way}: {median(rounds, 'wall'):.2f} s, {median(rounds, 'cpu'):.2f} CPU s, medians of {len(rounds)}")
    for way, target in (("log_metric", 30), ("asynchronous", 1), ("buffered", 1), ("log_batch", 1)):
        for kind in ("wall", "cpu"):
            ratios = [peer[kind] / found["ours"][number][kind] for number, peer in found[way].items()]
            print_ratio(f"{way} against ours, {kind}", ratios, target)


@contextlib.contextmanager
def mlflow_server(bench: Bench) -> Iterator[None]:
    """MLflow as `tunesmith up` starts it; its address in the environment."""
    port = ports.free()
    service = services.mlflow(get_settings(), port, os.environ | {"OMP_NUM_THREADS": "1"})
    log = bench.home / "mlflow.log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return service.start(file)

    with started(start, service.ready, "MLflow", log):
        os.environ["MLFLOW_TRACKING_URI"] = str(service.url)
        try:
            yield
        finally:
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def check_that_all_is_there(experiment: str, curves: Sequence[Sequence[float]]) -> None:
    """Every point of every trial is in MLflow, once, with its step and value."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([number])}
    for trial, curve in enumerate(curves):
        points = client.get_metric_history(runs[f"trial {trial}"], "train_loss")
        if sorted((p.step, p.value) for p in points) != list(enumerate(curve, 1)):
            sys.exit(f"{experiment}: trial {trial} has not all of its {len(curve)} points, but {len(points)}.")
        last = client.get_run(runs[f"trial {trial}"])
        if last.data.metrics["validation_loss"] != curve[-1] or last.data.params["r"] != str(ONE["r"]):
            sys.exit(f"{experiment}: trial {trial} has not its validation loss or its parameters.")


def ours_log(job: Mapping[str, Any]) -> None:
    """As the search's coordinator does it: it tells of all trials that are through a rung."""
    import optuna

    from registry import mlflow

    name, curves = job["experiment"], job["curves"]
    spec = StudySpec(
        study=name, model="m", base="", dataset="", system=None, max_tokens=1, trials=len(curves), reduction=1,
        rungs=rungs(len(curves[0]), number=3, reduction=3), workers=len(curves), space={},
    )  # fmt: skip
    jobs = done_jobs(spec, curves, job["params"])
    mirror = Mirror(spec, optuna.create_study(), parent := mlflow.start_run(name, "study"))
    say_json()
    for rung in range(len(spec.rungs)):
        mirror.log([j for j in jobs if j.rung <= rung])
    mlflow.end_run(parent)
    say_json()


def done_jobs(spec: StudySpec, curves: Sequence[Sequence[float]], params: Mapping[str, Any]) -> list[studies.Job]:
    """A study's jobs as its workers leave them, with these losses."""
    with transaction() as conn:
        studies.create(conn, spec.study, spec.model, spec.to_json())
        for rung, steps in enumerate(spec.rungs):
            begun = spec.rungs[rung - 1] if rung else 0
            for trial in range(len(curves)):
                studies.add_job(
                    conn, spec.study, trial=trial, rung=rung, trial_id=trial, params=params, steps=steps,
                    checkpoint=None,
                )  # fmt: skip
            while found := studies.claim(conn, spec.study, "w"):
                for j in found:
                    curve = [(step + 1, curves[j.trial][step]) for step in range(begun, steps)]
                    studies.finish(
                        conn, j, value=curve[-1][1], curve=curve, checkpoint="c", tokens=1, seconds=1.0,
                        adapter_parameters=1, latency_ms=None,
                    )  # fmt: skip
        return studies.jobs(conn, spec.study)
