"""A person's hand in a running search: what is refused, and with real workers what becomes of the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
import psutil
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from infra.db import transaction
from infra.errors import Conflict, NotFound, UsageError
from infra.settings import Settings, get_settings
from pipelines import commands
from pipelines.tuning import control
from pipelines.tuning.search import search
from pipelines.tuning.spec import StudySpec
from pipelines.tuning.worker import _Hold
from registry import datasets, mlflow, studies
from registry.bases import Base
from registry.datasets import make_row

PARAMS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "target_modules": "attention",
    "per_device_train_batch_size": 8,
}
SPACE = PARAMS | {"r": [4, 8], "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


def made(**changes: Any) -> StudySpec:
    fields: dict[str, Any] = {
        "study": "s", "model": "m", "base": "b", "dataset": "d", "system": None, "max_tokens": 64, "trials": 3,
        "rungs": (8, 24), "reduction": 3, "space": SPACE, "workers": 1, "adapters_per_pass": 1,
    }  # fmt: skip
    return StudySpec(**fields | changes)


@pytest.fixture
def study(database: Settings) -> str:
    """Three trials that wait, of a search that nobody carries out."""
    with transaction() as conn:
        conn.execute("insert into model (name) values ('m')")
        studies.create(conn, "s", "m", made().to_json())
        for trial in range(3):
            put_up(conn, trial)
    return "s"


def put_up(conn: Any, trial: int, rung: int = 0) -> None:
    params = PARAMS | {"learning_rate": 1e-3 * (trial + 1)}
    studies.add_job(conn, "s", trial=trial, rung=rung, trial_id=trial, params=params, steps=8, checkpoint=None)


def take() -> studies.Job:
    with transaction() as conn:
        (job,) = studies.claim(conn, "s", "w")
    return job


def done(job: studies.Job, value: float) -> None:
    with transaction() as conn:
        studies.finish(conn, job, value=value, curve=[], checkpoint="c", tokens=1, seconds=1.0, adapter_parameters=8)


def test_a_pruned_trial_has_no_worker_and_no_next_rung(study: str) -> None:
    waits, works, measured = 2, take(), take()
    assert (works.trial, measured.trial) == (0, 1)
    done(measured, 2.0)
    with _Hold([works]) as hold:
        assert hold.lost() == set()
        for trial in (waits, works.trial, measured.trial):
            assert control.prune_trial("s", trial) == {"study": "s", "trial": trial, "state": "pruned"}
        began = time.monotonic()
        until(lambda: hold._lost)
        assert time.monotonic() < began + 5  # long before its lease would have run out
        with pytest.raises(Conflict, match="was pruned"):
            hold.lost()
    for write in (lambda: done(works, 0.1), lambda: done(measured, 0.1)):
        with pytest.raises(Conflict):
            write()
    with transaction() as conn:
        assert studies.claim(conn, "s", "w") == []
        put_up(conn, 1, rung=1)  # the coordinator had decided before it could know
        jobs = studies.jobs(conn, "s")
    assert [(j.trial, j.rung, j.state, j.value) for j in jobs] == [
        (0, 0, "pruned", None), (1, 0, "pruned", 2.0), (2, 0, "pruned", None)
    ]  # fmt: skip


def test_what_is_over_cannot_be_pruned(study: str) -> None:
    with pytest.raises(NotFound, match="s has no trial 7"):
        control.prune_trial("s", 7)
    with pytest.raises(NotFound, match="no study t"):
        control.prune_trial("t", 0)
    control.prune_trial("s", 2)
    for trial, value in ((0, 1.0), (1, 2.0)):
        job = take()
        assert job.trial == trial
        done(job, value)
    with transaction() as conn:
        put_up(conn, 0, rung=1)
    for trial in (1, 2):  # left behind by its round; by hand
        with pytest.raises(Conflict, match=f"Trial {trial} of s is pruned already"):
            control.prune_trial("s", trial)
    done(take(), 0.5)
    with pytest.raises(Conflict, match="Trial 0 of s is complete already"):
        control.prune_trial("s", 0)
    with transaction() as conn:
        studies.stop(conn, "s")
    for act in (lambda: control.prune_trial("s", 0), lambda: control.clone_trial("s", 0, ["r=8"])):
        with pytest.raises(Conflict, match="The study s is stopped"):
            act()


def test_a_variant_is_the_trials_configuration_with_a_difference(study: str) -> None:
    asked = control.clone_trial("s", 1, ["learning_rate=3e-4", "target_modules=[v_proj, q_proj]", "r=8"])
    expected = PARAMS | {"learning_rate": 3e-4, "r": 8}
    assert {k: v for k, v in asked["params"].items() if k != "target_modules"} == {
        k: v for k, v in expected.items() if k != "target_modules"
    }
    assert sorted(asked["params"]["target_modules"]) == ["q_proj", "v_proj"]
    with transaction() as conn:
        (variant,) = studies.variants(conn, "s")
    assert (variant.number, variant.clone_of, variant.trial, variant.params) == (1, 1, None, asked["params"])
    with pytest.raises(Conflict, match="asked of s already"):
        control.clone_trial("s", 1, ["learning_rate=0.0003", "target_modules=[v_proj, q_proj]", "r=8"])
    with pytest.raises(UsageError, match="pissa needs lora_dropout: 0"):
        control.clone_trial("s", 1, ["init_lora_weights=pissa", "lora_dropout=0.1"])
    with pytest.raises(Conflict, match="Trial 0 of s has this configuration already"):
        control.clone_trial("s", 2, ["learning_rate=1e-3"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learning_rate", "is not of the form name=value"),
        ("learning_rate=", "needs one value"),
        ("learning_rate=fast", "--set learning_rate: must be a number, not 'fast'"),
        ("learning_rate=2", "--set learning_rate: must be from 1e-08 to 1, not 2"),
        ("r=7.5", "--set r: must be a whole number"),
        ("learning_rat=1e-3", "there is no such setting; did you mean 'learning_rate'?"),
        ("target_modules=everything", "is not known"),
        ("r={low: 4, high: 8}", "needs one value"),
        ("r=[4", "is not YAML"),
        ("use_dora=1", "is not known"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_sentence(study: str, setting: str, words: str) -> None:
    with pytest.raises(UsageError) as raised:
        control.clone_trial("s", 0, [setting])
    assert words in raised.value.message
    assert "\n" not in raised.value.message
    assert ".." not in raised.value.message
    with transaction() as conn:
        assert studies.variants(conn, "s") == []


@pytest.mark.parametrize(
    ("had", "setting", "words"),
    [
        ({"lora_dropout": 0.1}, "init_lora_weights=pissa", "pissa needs lora_dropout: 0"),
        ({"init_lora_weights": "pissa"}, "lora_dropout=0.1", "pissa needs lora_dropout: 0"),
        ({"init_lora_weights": "pissa"}, "use_dora=true", "pissa does not go with use_dora"),
    ],
)
def test_what_does_not_go_with_the_rest_is_said_of_what_was_asked(
    study: str, had: dict[str, Any], setting: str, words: str
) -> None:
    with transaction() as conn:
        studies.add_job(conn, "s", trial=9, rung=0, trial_id=9, params=PARAMS | had, steps=8, checkpoint=None)
    with pytest.raises(UsageError) as raised:
        control.clone_trial("s", 9, [setting])
    assert raised.value.message.startswith(f"--set {setting.partition('=')[0]}")
    assert words in raised.value.message


def test_a_variant_that_no_engine_could_serve_is_not_trained(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_MAX_LORA_RANK", "64")
    get_settings.cache_clear()
    with pytest.raises(UsageError, match=r"rank 128 .* is not served: engines here take 64 at most"):
        control.clone_trial("s", 0, ["r=128"])


# ------------------------------------------------------------------ with real workers
@pytest.fixture
def spec(tiny_base: Base) -> StudySpec:
    words = ["red", "green", "blue", "black", "white"]
    rows = [
        make_row(
            [{"role": "user", "content": f"colour {n}"}, {"role": "assistant", "content": words[n % 5]}],
            source="train", group=str(n),
        )
        for n in range(100)
    ]  # fmt: skip
    splits = {"train": rows[:80], "validation": rows[80:96], "test": rows[96:]}
    kept = datasets.keep(splits, counts={}, sources=[], recipe={})
    with transaction() as conn:
        conn.execute("insert into model (name) values ('m')")
    return made(base=tiny_base.digest, dataset=kept.digest)


def search_process(spec: StudySpec, parent: str = "") -> subprocess.Popen[bytes]:
    code = (
        "import json, sys; from pipelines.tuning.search import search; from pipelines.tuning.spec import StudySpec\n"
        "spec = StudySpec.from_json(json.loads(sys.argv[1]))\n"
        "search(spec, progress=lambda *_: None, mlflow_parent=sys.argv[2] or None)"
    )
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(spec.to_json()), parent])


def until(true: Callable[[], Any], seconds: float = 200) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return found


def jobs(name: str = "s") -> list[studies.Job]:
    with transaction() as conn:
        return studies.jobs(conn, name)


def running(trial: int) -> studies.Job | None:
    return next((j for j in jobs() if j.state == "running" and j.trial == trial), None)


def in_optuna() -> list[optuna.trial.FrozenTrial]:
    url = get_settings().database("optuna").replace("postgresql://", "postgresql+psycopg://", 1)
    store = optuna.storages.RDBStorage(url)
    try:
        return optuna.load_study(study_name="s", storage=store).trials
    finally:
        store.engine.dispose()


def test_a_running_trial_is_left_at_once_and_a_variant_comes_next(spec: StudySpec, mlflow_server: str) -> None:
    parent = mlflow.start_run(mlflow.experiment_of("m"), "train")
    process = search_process(replace(spec, rungs=(600,), trials=2), parent)
    try:
        victim = until(lambda: running(0))
        asked = CliRunner().invoke(commands.study, ["clone-trial", "s", "0", "--set", "learning_rate=2e-3", "--json"])
        assert json.loads(asked.output)["params"] == victim.params | {"learning_rate": 2e-3}
        until(lambda: len(jobs()) == 2)
        began = time.monotonic()
        pruned = CliRunner().invoke(commands.study, ["prune-trial", "s", "0", "--json"])
        assert json.loads(pruned.output) == {"study": "s", "trial": 0, "state": "pruned"}
        successor = until(lambda: running(1))
        waited = time.monotonic() - began
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()
    assert successor.worker == victim.worker  # the same process, which lives on
    left, variant, drawn = jobs()
    assert [(j.trial, j.state, j.clone_of) for j in (left, variant, drawn)] == [
        (0, "pruned", None), (1, "done", 0), (2, "done", None)
    ]  # fmt: skip
    assert left.value is None
    assert variant.seconds is not None
    assert waited < variant.seconds / 2  # it was not trained to the end first
    first, second, third = in_optuna()
    assert [t.state.name for t in (first, second, third)] == ["PRUNED", "COMPLETE", "COMPLETE"]
    assert second.params["learning_rate"] == 2e-3
    assert second.user_attrs["clone_of"] == 0
    with transaction() as conn:
        row = studies.get(conn, "s")
    assert (row["state"], row["best"]["trials"], row["best"]["pruned"]) == ("completed", 3, 1)
    found = MlflowClient(tracking_uri=mlflow_server).search_runs(
        [MlflowClient(tracking_uri=mlflow_server).get_run(parent).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent}'",
    )
    tags = {run.data.tags["tunesmith.trial"]: run.data.tags for run in found}
    assert {n: t["tunesmith.outcome"] for n, t in tags.items()} == {"0": "pruned", "1": "complete", "2": "complete"}
    assert tags["1"]["tunesmith.clone_of"] == "0"
    shown = CliRunner().invoke(commands.study, ["show", "s", "--json"])
    assert [(t["trial"], t["state"], t["clone_of"]) for t in json.loads(shown.output)["trials"]] == [
        (0, "pruned by hand", None), (1, "complete", 0), (2, "complete", None)
    ]  # fmt: skip


def test_a_variant_comes_before_what_was_drawn_and_waits(spec: StudySpec) -> None:
    process = search_process(replace(spec, rungs=(300, 900), adapters_per_pass=1))
    try:
        until(lambda: running(0))
        CliRunner().invoke(commands.study, ["clone-trial", "s", "0", "--set", "learning_rate=2e-3"])
        until(lambda: running(3))
        assert [(j.trial, j.state) for j in jobs()] == [(0, "done"), (1, "waiting"), (2, "waiting"), (3, "running")]
    finally:
        workers = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        for worker in workers:
            worker.kill()


def test_a_variant_between_two_groups_changes_nothing_for_the_second(spec: StudySpec) -> None:
    """Though the numbers of all that come after it are higher: its trials have the same seeds."""
    two = replace(spec, trials=6, rungs=(40, 120), space=SPACE | {"lora_dropout": 0.1})
    search(replace(two, study="calm"), progress=lambda *_: None)
    process = search_process(two)
    try:
        until(lambda: running(0))
        control.clone_trial("s", 0, ["r=16"])
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()
    variant = next(j for j in jobs() if j.clone_of is not None)
    drawn = [j for j in jobs() if j.clone_of is None]
    assert variant.trial == 3
    assert sorted({j.trial for j in drawn}) == [0, 1, 2, 4, 5, 6]
    place = {trial: n for n, trial in enumerate(sorted({j.trial for j in drawn}))}
    assert [(place[j.trial], j.rung, j.params, j.value) for j in drawn] == [
        (j.trial, j.rung, j.params, j.value) for j in jobs("calm")
    ]


def test_a_variant_takes_part_in_halving_and_changes_nothing_for_the_others(spec: StudySpec) -> None:
    calm = search(replace(spec, study="calm", rungs=(40, 120)), progress=lambda *_: None)
    process = search_process(replace(spec, rungs=(40, 120)))
    try:
        until(lambda: running(0))
        control.clone_trial("s", 0, ["r=16", "learning_rate=5e-3"])  # of r the space knows 4 and 8 only
    finally:
        workers = psutil.Process(process.pid).children()
        process.kill()  # whether it has seen the request or not
        process.wait()
    disturbed = search(replace(spec, rungs=(40, 120)), progress=lambda *_: None)
    psutil.wait_procs(workers, timeout=60)
    drawn = [j for j in jobs() if j.clone_of is None]
    assert [(j.trial, j.rung, j.params, j.value) for j in drawn] == [
        (j.trial, j.rung, j.params, j.value) for j in jobs("calm")
    ]
    first, *more = [j for j in jobs() if j.clone_of is not None]
    assert (first.trial, first.clone_of, first.params["r"], first.params["learning_rate"]) == (3, 0, 16, 5e-3)
    better = sum(j.value < first.value for j in drawn if j.rung == 0)  # type: ignore[operator]
    assert [j.rung for j in more] == ([1] if better < 2 else [])  # two places for four
    assert (calm.trials, disturbed.trials) == (3, 4)
    with transaction() as conn:
        assert [v.trial for v in studies.variants(conn, "s")] == [3]
    last = in_optuna()[-1]
    assert (last.number, "r" in last.params, last.params["learning_rate"]) == (3, False, 5e-3)
    assert last.state.name == ("COMPLETE" if more else "PRUNED")
