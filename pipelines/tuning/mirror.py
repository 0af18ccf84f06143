"""What Optuna and MLflow are told of a study: they are brought up to what the jobs say, and saying it twice adds
nothing, so that a coordinator that is killed in between loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from infra.db import transaction
from infra.services import sqlalchemy_url
from infra.settings import get_settings
from pipelines.tuning import space as spaces
from pipelines.tuning.spec import StudySpec
from registry import halving, mlflow, studies

if TYPE_CHECKING:
    import optuna

# User attributes of a trial: of one that is another one's whole, that one's number; of one that was drawn, its place
# among those; of a variant, its number among those
WHOLE, PLACE, VARIANT = "whole", "place", "variant"
_AT_ONCE = 4  # trials that MLflow is told of at once


class Mirror:
    """One coordinator's memory of what it has told. `parent` is the MLflow run that the trials' runs are nested in;
    without it MLflow is told nothing."""

    def __init__(self, spec: StudySpec, study: optuna.Study, parent: str | None) -> None:
        self.spec, self.optuna, self.parent = spec, study, parent
        self.nested: mlflow.Nested | None = None  # what MLflow has of earlier coordinators', asked for once
        self.runs: dict[int, str] = {}  # trial -> MLflow run
        self.logged: set[tuple[int, int]] = set()
        self.told: set[int] = set()  # trials that Optuna knows the end of
        self.closed: set[int] = set()  # trials that MLflow knows the end of

    def tell(self, jobs: Sequence[studies.Job]) -> None:
        """Bring Optuna up to what the jobs say; all of it can be said twice."""
        import optuna

        open_ = [mine for number, mine in halving.by_trial(jobs).items() if number not in self.told]
        trials = self.optuna.get_trials(deepcopy=False) if open_ else []
        overs = self._overs(jobs)
        for mine in open_:
            last = mine[-1]
            frozen, over = trials[last.trial], overs[last.trial]
            if frozen.state == optuna.trial.TrialState.RUNNING:
                trial = optuna.trial.Trial(self.optuna, last.trial_id)
                for job in mine:
                    if job.value is not None and job.steps not in frozen.intermediate_values:
                        trial.report(job.value, job.steps)
                if over is not None:
                    value = last.value if over == optuna.trial.TrialState.COMPLETE else None
                    self.optuna.tell(last.trial, value, state=over)
            elif over is not None:
                self._tell_rest(trials, mine, over)
            if over is not None:
                self.told.add(last.trial)

    def _tell_rest(
        self, trials: Sequence[optuna.trial.FrozenTrial], mine: Sequence[studies.Job], over: optuna.trial.TrialState
    ) -> None:
        """A trial that was left behind when the search was stopped, and went on when it was resumed, stands in Optuna
        twice, since Optuna opens none again: as it was then, and whole."""
        import optuna

        then = trials[mine[-1].trial]
        course = {job.steps: job.value for job in mine if job.value is not None}
        if then.state == over and set(course) <= set(then.intermediate_values):
            return
        if any(t.user_attrs.get(WHOLE) == then.number for t in trials):  # by an earlier coordinator
            return
        self.optuna.add_trial(
            optuna.trial.create_trial(
                state=over,
                value=mine[-1].value if over == optuna.trial.TrialState.COMPLETE else None,
                params=then.params,
                distributions=then.distributions,
                intermediate_values=course,
                user_attrs=then.user_attrs | {WHOLE: then.number},
            )
        )

    def _overs(self, jobs: Sequence[studies.Job]) -> dict[int, optuna.trial.TrialState | None]:
        """How each trial ended, or None while it may still go on."""
        import optuna

        states = optuna.trial.TrialState
        words = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        return {trial: words[ended] if ended else None for trial, ended in halving.fates(self.spec, jobs).items()}

    def log(self, jobs: Sequence[studies.Job]) -> None:
        """Bring MLflow up to what the jobs say: a nested run a trial, with its curves. Repeating it adds nothing."""
        if self.parent is None:
            return
        overs, trials = self._overs(jobs), halving.by_trial(jobs)
        new = [j for j in jobs if j.value is not None and (j.trial, j.rung) not in self.logged]
        with transaction() as conn:
            curves = studies.curves(conn, self.spec.study, new) if new else {}
        open_ = [number for number in trials if number not in self.closed]
        if any(number not in self.runs for number in open_):
            self.nested = self.nested or mlflow.Nested(self.parent)
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # a call is mostly waited for
            list(pool.map(lambda number: self._log_trial(trials[number], overs[number], curves), open_))

    def _log_trial(
        self, mine: Sequence[studies.Job], over: optuna.trial.TrialState | None, curves: Mapping[tuple[int, int], Any]
    ) -> None:
        """Bring MLflow up to what a trial's jobs say, as far as their curves are given."""
        last, told = mine[-1], False
        if last.trial not in self.runs:
            assert self.nested is not None  # noqa: S101  asked for before the first trial
            self.runs[last.trial] = self.nested.start_run(
                f"trial {last.trial}",
                params=mine[0].params,
                tags={
                    "tunesmith.study": self.spec.study,
                    "tunesmith.trial": str(last.trial),
                    "tunesmith.clone_of": "" if mine[0].clone_of is None else str(mine[0].clone_of),
                },
                key=f"{self.spec.study}/{last.trial}",
            )
        run = self.runs[last.trial]
        for job in mine:
            if (curve := curves.get((job.trial, job.rung))) is None:
                continue
            points = [("train_loss", loss, int(step)) for step, loss in curve]
            points.append(("validation_loss", halving.loss(job), job.steps))
            # The time is the job's, so that another coordinator sends the same points
            told = job is last and over is not None
            tags = _outcome(over.name.lower(), last) if told and over is not None else None
            mlflow.log_points(run, points, at_ms=int(job.updated_at.timestamp() * 1000), tags=tags)
            self.logged.add((job.trial, job.rung))
        if over is not None:
            self._close(run, None if told else over.name.lower(), last)

    def _close(self, run: str, outcome: str | None, last: studies.Job) -> None:
        """End a trial's run; its outcome is None where MLflow has it already."""
        if outcome is not None:
            mlflow.set_tags(run, _outcome(outcome, last))
        mlflow.end_run(run, "FAILED" if last.state == "failed" else "FINISHED")
        self.closed.add(last.trial)

    def leave_behind(self, jobs: Sequence[studies.Job]) -> None:
        """Of a search that is over, tell all, and that trials that it did not get to judge are over too."""
        import optuna

        self.tell(jobs)
        self.log(jobs)
        for number, mine in halving.by_trial(jobs).items():
            if number not in self.told:
                with contextlib.suppress(ValueError):  # told by an earlier coordinator
                    self.optuna.tell(number, state=optuna.trial.TrialState.PRUNED)
                self.told.add(number)
            if number in self.runs and number not in self.closed:
                self._close(self.runs[number], "stopped", mine[-1])


def _outcome(word: str, last: studies.Job) -> dict[str, str]:
    return {"tunesmith.outcome": word, "tunesmith.error": last.error or ""}


def begin(
    study: optuna.Study, space: Mapping[str, Any], mark: str, wanted: Mapping[int, Mapping[str, Any]], **more: Any
) -> dict[int, optuna.trial.FrozenTrial]:
    """Have Optuna know configurations that are under way, by their numbers as one of the marks: each at once whole, of
    what the space can draw of it, and not again where an earlier coordinator died before it put them up."""
    import optuna

    states = optuna.trial.TrialState
    known, distributions = _running(study, mark), spaces.distributions(space)
    for number, params in wanted.items():
        drawn = spaces.drawable(space, params)
        if number in known:
            if known[number].params == drawn:
                continue
            study.tell(known[number].number, state=states.FAIL)  # what can be seen has changed since
        study.add_trial(
            optuna.trial.create_trial(
                state=states.RUNNING,
                params=drawn,
                distributions={name: distributions[name] for name in drawn},
                user_attrs={mark: number} | more,
            )
        )
    return _running(study, mark)


def _running(study: optuna.Study, mark: str) -> dict[int, optuna.trial.FrozenTrial]:
    """The trials that are under way and have one of the marks, by its number."""
    import optuna

    trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    return {t.user_attrs[mark]: t for t in trials if mark in t.user_attrs}


def open_store() -> optuna.storages.RDBStorage:
    import optuna

    url = sqlalchemy_url(get_settings().database("optuna"), "psycopg")
    # pool_pre_ping: a connection that a database restart broke is replaced, not used
    return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "pool_size": 2})


def open_study(spec: StudySpec, store: optuna.storages.RDBStorage) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=store,
        sampler=optuna.samplers.RandomSampler(),  # never asked: draws.py has what draws
        study_name=spec.study,
        direction="minimize",
        load_if_exists=True,
    )
