"""Fault 4: the database server itself, which MLflow has too, goes down in the middle of a search, at once and for a
while."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from mlflow import MlflowClient

from infra import db, migrate, ports, postgres, settings
from infra.errors import Unreachable
from pipelines.tuning.spec import StudySpec
from registry import datasets, mlflow, studies
from registry.bases import Base
from registry.datasets import make_row
from tests.conftest import give_base
from tests.integration.conftest import mlflow_on

ROWS = [
    make_row(
        [{"role": "user", "content": f"colour {n}"}, {"role": "assistant", "content": ["red", "green", "blue"][n % 3]}]
    )
    for n in range(60)
]
SPACE = {
    "r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "target_modules": "attention", "per_device_train_batch_size": 8,
}  # fmt: skip


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def jobs() -> list[studies.Job]:
    with db.transaction() as conn:
        return studies.jobs(conn, "m-1", curves=True)


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True])
def test_a_search_outlasts_an_immediate_restart_of_its_database(
    tiny_made: Base, home: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    cluster, port = postgres.prepare(home), ports.free()
    running = [cluster.start(port)]
    coordinator = None
    with ExitStack() as over:
        over.callback(lambda: postgres.stop(running[-1]))
        over.callback(_forget_pool)
        cluster.wait(running[-1], port)
        monkeypatch.setenv("TUNESMITH_DATABASE_URL", cluster.url(port))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", over.enter_context(mlflow_on(cluster.url(port))))
        settings.get_settings.cache_clear()
        with psycopg.connect(cluster.url(port), autocommit=True) as conn:
            conn.execute("create database tunesmith")
            conn.execute("create database optuna")
        migrate.migrate(cluster.url(port, "tunesmith"))
        base = give_base(tiny_made)
        kept = datasets.keep({"train": ROWS[:48], "validation": ROWS[48:]}, counts={}, sources=[], recipe={})
        with db.transaction() as own:
            own.execute("insert into model (name) values ('m')")
        spec = StudySpec(
            study="m-1", model="m", base=base.digest, dataset=kept.digest, system=None, max_tokens=64, trials=3,
            rungs=(20, 60), reduction=3, space=SPACE, workers=2,
        )  # fmt: skip
        code = (
            "import json, sys; from pipelines.tuning.search import search\n"
            "from pipelines.tuning.spec import StudySpec\n"
            "spec = StudySpec.from_json(json.loads(sys.argv[1]))\n"
            "print(json.dumps(search(spec, progress=lambda *_: None, mlflow_parent=sys.argv[2]).to_json()))"
        )
        parent = mlflow.start_run(mlflow.experiment_of("m"), "train")
        coordinator = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(spec.to_json()), parent], stdout=subprocess.PIPE, text=True
        )
        over.callback(coordinator.wait)
        over.callback(coordinator.kill)

        def under_way() -> bool:
            assert coordinator.poll() is None
            with psycopg.connect(cluster.url(port, "tunesmith")) as look:
                found = look.execute("select 1 from rung_job where state = 'running'").fetchone()
            return found is not None

        until(under_way)
        running[-1].send_signal(signal.SIGQUIT)  # as `pg_ctl stop -m immediate`
        running[-1].wait(30)
        assert coordinator.poll() is None
        if away:  # longer than MLflow's client tries
            with pytest.raises(Unreachable):
                mlflow.log_points(parent, [("loss", 1.0, 1)])
        running.append(cluster.start(port))
        cluster.wait(running[-1], port)
        said, _ = coordinator.communicate(timeout=300)
        assert coordinator.returncode == 0
        best = json.loads(said)
        until(lambda: len(jobs()) == 4)
        found = jobs()
        assert [(j.trial, j.rung) for j in found if j.rung == 0] == [(0, 0), (1, 0), (2, 0)]
        assert all(j.state == "done" for j in found)
        for job in found:  # each step once
            first = 1 if job.rung == 0 else 21
            assert [step for step, _ in job.curve or []] == list(range(first, job.steps + 1))
        assert (best["trials"], best["failed"], best["stopped_by"], best["steps"]) == (3, 0, "trials", 60)
        client = MlflowClient(tracking_uri=settings.get_settings().need("mlflow_url"))
        experiment = client.get_run(parent).info.experiment_id
        nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert {run.info.status for run in nested} == {"FINISHED"}
        for run in nested:  # and MLflow has each of them
            mine = [job for job in found if str(job.trial) == run.data.tags["tunesmith.trial"]]
            points = client.get_metric_history(run.info.run_id, "train_loss")
            assert sorted(point.step for point in points) == list(range(1, mine[-1].steps + 1))
        assert len(nested) == 3


def _forget_pool() -> None:
    if db.pool.cache_info().currsize:
        db.pool().close()
    db.pool.cache_clear()
