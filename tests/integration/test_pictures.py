"""Optuna's pictures of studies as they stand in PostgreSQL: whole, short, empty, and of several objectives."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import optuna
import pytest

from infra.db import transaction
from infra.errors import NotFound
from infra.settings import Settings
from pipelines.tuning import pictures
from pipelines.tuning.spec import StudySpec
from registry import mlflow, studies

RUNGS = (6, 18, 54)


@pytest.fixture
def store(database: Settings) -> Iterator[optuna.storages.RDBStorage]:
    url = database.database("optuna").replace("postgresql://", "postgresql+psycopg://", 1)
    found = optuna.storages.RDBStorage(url)
    yield found
    found.engine.dispose()


def search(store: optuna.storages.RDBStorage, trials: int, name: str = "m-1") -> optuna.Study:
    """A study as a search leaves it: most trials pruned after their first rung, every seventh failed. What counts is
    the learning rate; the loss rises again in the last rung."""
    study = optuna.create_study(storage=store, study_name=name, sampler=optuna.samplers.RandomSampler(seed=1))
    for number in range(trials):
        trial = study.ask()
        rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
        trial.suggest_categorical("target_modules", ["attention", "all-linear", '["<b>q_proj", "v_proj"]'])
        trial.suggest_int("r", 4, 4)  # never varies
        trial.suggest_float("lora_dropout", 0.0, 0.3)
        if number % 7 == 6:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        far = 3 if number % 9 == 0 else 2 if number % 3 == 0 else 1
        losses = [3 - 200 * rate - 0.1 * rung + (0.5 if rung == 2 else 0) for rung in range(far)]
        for steps, loss in zip(RUNGS, losses, strict=False):
            trial.report(loss, steps)
        if far == 3:
            study.tell(trial, losses[-1])
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return study


def texts(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_search_is_drawn_once_and_again_and_leaves_nothing_behind(
    store: optuna.storages.RDBStorage, tmp_path: Path
) -> None:
    study = search(store, 20)
    before = dict(matplotlib.rcParams)
    names = pictures.draw(study, tmp_path)
    drawn = ["history", "learning-curves", "importances", "parallel-coordinates", "slice"]
    assert names == ["index.html", *(f"{name}.svg" for name in drawn)]
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.pyplot.get_fignums() == []
    page = texts(tmp_path / "index.html")
    assert "m-1" in page
    assert "18 trials" in page  # two of the twenty failed
    shown = [base64.b64decode(found).decode() for found in re.findall(r"base64,([^\"]+)", page)]
    assert shown == [texts(tmp_path / name) for name in names[1:]]  # the page needs no other file
    for text in shown:
        root = ElementTree.fromstring(text)  # noqa: S314 - our own drawing
        width, height = (float(str(root.get(side)).removesuffix("pt")) for side in ("width", "height"))
        assert width > 450
        assert height > 150
        assert "<script" not in text
    again = tmp_path / "again"
    again.mkdir()
    assert pictures.draw(study, again) == names
    for name in names:
        assert texts(again / name) == texts(tmp_path / name), name


def test_importances_say_what_decided(store: optuna.storages.RDBStorage) -> None:
    found = pictures.importances(search(store, 40))
    assert next(iter(found)) == "learning_rate"
    assert set(found) == {"learning_rate", "target_modules", "lora_dropout"}  # what never varies decides nothing
    assert found["learning_rate"] > 2 * found["lora_dropout"]


@pytest.mark.parametrize(
    ("trials", "drawn"),
    [
        (0, []),
        (1, ["history", "learning-curves"]),
        (3, ["history", "learning-curves", "parallel-coordinates", "slice"]),
    ],
)
def test_what_there_are_too_few_trials_for_is_left_out(
    store: optuna.storages.RDBStorage, tmp_path: Path, trials: int, drawn: list[str]
) -> None:
    names = pictures.draw(search(store, trials), tmp_path)
    assert names == [*(["index.html"] if drawn else []), *(f"{name}.svg" for name in drawn)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_trials_without_some_parameter_are_drawn_too(store: optuna.storages.RDBStorage, tmp_path: Path) -> None:
    study = search(store, 12)
    rate = optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)
    study.add_trial(  # as a variant that a person asked for, with a value that the space does not have
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED, params={"learning_rate": 2e-3},
            distributions={"learning_rate": rate}, intermediate_values={6: 2.0},
        )
    )  # fmt: skip
    names = pictures.draw(study, tmp_path)
    assert {"importances.svg", "parallel-coordinates.svg", "slice.svg"} <= set(names)
    assert next(iter(pictures.importances(study))) == "learning_rate"


def test_a_running_search_can_be_drawn(store: optuna.storages.RDBStorage, tmp_path: Path) -> None:
    study = search(store, 4)
    for _ in range(2):
        study.ask({"learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)})
    assert "history.svg" in pictures.draw(study, tmp_path)
    assert "4 trials" in texts(tmp_path / "index.html")


def test_a_trial_that_went_on_when_the_search_was_resumed_counts_once(
    store: optuna.storages.RDBStorage, tmp_path: Path
) -> None:
    study = search(store, 8)
    then = study.trials[1]
    assert then.state == optuna.trial.TrialState.PRUNED
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE, value=0.5, params=then.params, distributions=then.distributions,
            intermediate_values=then.intermediate_values | {18: 0.75, 54: 0.5}, user_attrs={"whole": 1},
        )
    )  # fmt: skip
    once = pictures._complete(study, pictures._lowest)
    values = {t.number: t.value for t in once.trials if t.state == optuna.trial.TrialState.COMPLETE}
    assert sorted(values) == [0, 1, 2, 3, 4, 5, 7]  # the one with number 6 failed
    assert values[1] == 0.5
    assert once.trials[1].intermediate_values == then.intermediate_values | {18: 0.75, 54: 0.5}
    assert "history.svg" in pictures.draw(study, tmp_path)
    assert "7 trials" in texts(tmp_path / "index.html")


def test_what_the_winner_is_picked_by_has_a_front(store: optuna.storages.RDBStorage, tmp_path: Path) -> None:
    study = search(store, 6)
    measures = {"loss": {0: 2.0, 1: 1.5, 2: 1.9, 4: float("inf")}, "adapter_parameters": {0: 10.0, 1: 30.0, 2: 40.0}}
    assert "pareto-front.svg" in pictures.draw(study, tmp_path, measures)
    assert "Pareto front" in texts(tmp_path / "index.html")
    one = tmp_path / "one"
    one.mkdir()
    assert "pareto-front.svg" not in pictures.draw(study, one, {"loss": measures["loss"]})
    assert "pareto-front.svg" not in pictures.draw(study, one, {"loss": {0: 2.0}, "adapter_parameters": {0: 10.0}})


def test_the_pictures_stand_in_the_runs_artifacts(store: optuna.storages.RDBStorage, mlflow_server: str) -> None:
    import mlflow as client

    study = search(store, 8)
    spec = StudySpec(
        study="m-1", model="m", base="b", dataset="d", system=None, max_tokens=9, trials=8, rungs=RUNGS, reduction=3,
        space={}, objectives=["loss", "training_tokens"],
    )  # fmt: skip
    with transaction() as conn:
        conn.execute("insert into model (name) values ('m')")
        studies.create(conn, "m-1", "m", spec.to_json())
        for trial in range(3):
            studies.add_job(conn, "m-1", trial=trial, rung=0, trial_id=trial, params={}, steps=6, checkpoint=None)
            (job,) = studies.claim(conn, "m-1", "w")
            value = study.trials[trial].intermediate_values[6]
            studies.finish(conn, job, value=value, curve=[], checkpoint="c", tokens=100 - 10 * trial, seconds=1.0,
                           adapter_parameters=8)  # fmt: skip
    run = mlflow.start_run("tunesmith/m", "train")
    assert next(iter(pictures.log_pictures("m-1", run))) == "learning_rate"
    found = client.MlflowClient(tracking_uri=mlflow_server).list_artifacts(run, "search")
    assert {"search/index.html", "search/history.svg", "search/importances.svg", "search/pareto-front.svg"} <= {
        file.path for file in found
    }
    with pytest.raises(NotFound):
        pictures.log_pictures("nothing", run)
