"""Optuna's own pictures of a study: SVG files and a page that shows them, kept with the pipeline run in MLflow.

Optuna draws complete trials, but most trials of a search end pruned. So what is drawn is a copy of the study, in
memory, in which every trial that was ever measured is complete.
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.db import transaction
from pipelines.tuning.mirror import WHOLE, open_store
from pipelines.tuning.objectives import measured
from pipelines.tuning.spec import StudySpec
from registry import mlflow, studies

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

Measures = Mapping[str, Mapping[int, float]]  # what trials are weighed by -> trial -> value

_FOLDER = "search"  # in the run's artifacts
_BEST = 1 / 3  # of the trials, for importances: about those that successive halving lets go on
_FEWEST = 6  # trials for importances: two of them are then the best third
_NAMED = 12  # trials that a legend names
_LOSS = "validation loss"
_BESIDE = 4  # parameters in one picture of slices


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file's name, without its ending, and what the page says about it."""

    name: str
    title: str
    says: str


_HISTORY = Picture(
    name="history", title="History", says="Each trial's loss in the order of the trials, and the best so far."
)
_CURVES = Picture(
    name="learning-curves", title="Learning curves", says="Validation loss of each trial at the end of each rung."
)
_IMPORTANCES = Picture(
    name="importances",
    title="Importances",
    says="How much each parameter decided whether a trial was among the best third after the first rung, where all "
    "trials had the same number of steps (PED-ANOVA).",
)
_PARALLEL = Picture(
    name="parallel-coordinates", title="Parallel coordinates", says="A line a trial; the darker, the lower its loss."
)
_SLICE = Picture(
    name="slice", title="Slice", says="Loss against each parameter; the darker, the later the trial was begun."
)
_PARETO = Picture(
    name="pareto-front",
    title="Pareto front",
    says="Of the measures that the winner is picked by, the trials that no other one beats in all, and the others.",
)


def log_pictures(study_name: str, mlflow_run_id: str) -> dict[str, float]:
    """Draw a study, finished or not, and upload it to a run's artifacts, under `search/`; returns the importances.

    Raises NotFound, Unreachable, or TunesmithError when MLflow does not take the files.
    """
    measures = _measures(study_name)
    with _opened(study_name) as study, tempfile.TemporaryDirectory(prefix="tunesmith-pictures-") as scratch:
        if draw(study, Path(scratch), measures):
            mlflow.log_folder(mlflow_run_id, Path(scratch), _FOLDER)
        return importances(study)


def draw(study: optuna.Study, folder: Path, measures: Measures | None = None) -> list[str]:
    """Draw a study into a folder: `index.html` and the SVG files it shows; returns their names.

    With two or three `measures`, of which less is better, the front of the trials that have them all is drawn too. A
    picture that the study has too few trials for is left out; without any measured trial there are no files.
    Drawing the same study again gives the same files. Not thread-safe, as pyplot is not.
    """
    drawn = []
    with _quiet():
        for picture, plot in _plots(study, measures or {}):
            with _canvas(study.study_name):
                _save(plot(), picture, folder / f"{picture.name}.svg")
            drawn.append(picture)
    if not drawn:
        return []
    (folder / "index.html").write_text(_page(study, drawn, folder), encoding="utf-8")
    return ["index.html", *(f"{picture.name}.svg" for picture in drawn)]


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each parameter decided who was among the best third after the first rung, the most important first
    (PED-ANOVA, Watanabe et al. 2023); empty when there are too few trials or only one parameter varies."""
    import optuna

    with _quiet():
        compared = _after_first_rung(study)
        varied = _varied(_trials(compared))
        if len(_trials(compared)) < _FEWEST or len(varied) < 2:
            return {}
        found = optuna.importance.get_param_importances(compared, evaluator=_evaluator(), params=varied)
    return {name: round(float(value), 4) for name, value in found.items()}


def _measures(study_name: str) -> Measures:
    """What trials were weighed by, each as it was when its loss was lowest; nothing when that was the loss alone."""
    with transaction() as conn:
        spec = StudySpec.from_json(studies.get(conn, study_name)["spec"])
        rows = measured(studies.jobs(conn, study_name))
    if len(spec.objectives) == 1:
        return {}
    lowest = {job.trial: row for job, row in sorted(rows, key=lambda pair: -pair[1]["loss"])}  # the last one stays
    return {name: {trial: row[name] for trial, row in lowest.items()} for name in spec.objectives}


@contextmanager
def _opened(study_name: str) -> Iterator[optuna.Study]:
    import optuna

    store = open_store()
    try:
        yield optuna.load_study(study_name=study_name, storage=store)
    finally:
        store.engine.dispose()


def _plots(study: optuna.Study, measures: Measures) -> Iterator[tuple[Picture, Callable[[], Figure]]]:
    """The pictures this study has enough trials for."""
    from optuna.visualization import matplotlib as plots

    measured = _complete(study, _lowest)
    trials = _trials(measured)
    if not trials:
        return
    yield _HISTORY, lambda: _figure(plots.plot_optimization_history(measured, target_name=_LOSS))
    if any(len(t.intermediate_values) > 1 for t in trials):
        yield _CURVES, lambda: _curves(plots.plot_intermediate_values(measured), len(trials))
    if len(measures) in (2, 3) and len(_trials(front := _weighed(study, measures))) > 1:
        names = [name.replace("_", " ") for name in measures]
        yield _PARETO, lambda: _figure(plots.plot_pareto_front(front, target_names=names))
    if importances(study):
        compared = _after_first_rung(study)
        compared_in = _varied(_trials(compared))
        yield _IMPORTANCES, lambda: _bars(plots.plot_param_importances(compared, _evaluator(), compared_in))
    if not (varied := _varied(trials)):
        return
    yield (
        _PARALLEL,
        lambda: _parallel(
            plots.plot_parallel_coordinate(measured, varied, target_name=_LOSS), [_LOSS, *sorted(varied)]
        ),
    )
    for number, start in enumerate(range(0, len(varied), _BESIDE), 1):
        part = varied[start : start + _BESIDE]
        picture = _SLICE if number == 1 else replace(_SLICE, name=f"slice-{number}", title=f"Slice, {number}")
        # The loop's values are bound now; the drawing is done by whoever asked for the picture
        yield picture, lambda part=part: _slice(plots.plot_slice(measured, part, target_name=_LOSS))  # type: ignore[misc]


def _weighed(study: optuna.Study, measures: Measures) -> optuna.Study:
    """The copy in which a trial's values are its `measures`, for those that have them all."""
    import optuna

    copy = optuna.create_study(directions=["minimize"] * len(measures), study_name=study.study_name)
    for number, trial in enumerate(_once(study)):
        values = [by_trial.get(number, math.nan) for by_trial in measures.values()]
        _put(copy, trial, values if all(map(math.isfinite, values)) else None)
    return copy


def _once(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """A study's trials by their numbers, without those that another one is the whole of: that one stands in the place
    of the one that was left behind, and in its own nothing that was measured."""
    from optuna.trial import TrialState, create_trial

    trials = study.get_trials(deepcopy=False)
    wholes = {t.user_attrs[WHOLE]: t for t in trials if WHOLE in t.user_attrs}
    nothing = create_trial(state=TrialState.FAIL)
    return [nothing if WHOLE in t.user_attrs else wholes.get(t.number, t) for t in trials]


def _complete(study: optuna.Study, value: Callable[[optuna.trial.FrozenTrial], float | None]) -> optuna.Study:
    """The copy in which a trial that has a `value` is complete with it."""
    import optuna

    copy = optuna.create_study(study_name=study.study_name)
    for trial in _once(study):
        found = value(trial)
        _put(copy, trial, None if found is None else [found])
    return copy


def _put(copy: optuna.Study, trial: optuna.trial.FrozenTrial, values: list[float] | None) -> None:
    """Without values as failed, so that all trials keep their numbers."""
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState

    distributions = {
        name: CategoricalDistribution([_brief(choice) for choice in each.choices])
        if isinstance(each, CategoricalDistribution)
        else each
        for name, each in trial.distributions.items()
    }
    copy.add_trial(
        optuna.trial.create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE, values=values,
            params={name: _brief(value) for name, value in trial.params.items()}, distributions=distributions,
            intermediate_values=trial.intermediate_values if len(copy.directions) == 1 else {},
        )
    )  # fmt: skip


def _brief(choice: Any) -> Any:
    """A list of modules in few letters: q+v for ["q_proj", "v_proj"]."""
    if not isinstance(choice, str) or not choice.startswith("["):
        return choice
    return "+".join(str(part).removesuffix("_proj") for part in json.loads(choice))


def _after_first_rung(study: optuna.Study) -> optuna.Study:
    """The copy in which a trial's value is its loss after the fewest steps, which all trials were measured at."""
    first = min((step for t in _once(study) for step in t.intermediate_values), default=0)
    return _complete(study, lambda t: t.intermediate_values.get(first))


def _evaluator() -> optuna.importance.PedAnovaImportanceEvaluator:
    import optuna

    return optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST)


def _trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _lowest(trial: optuna.trial.FrozenTrial) -> float | None:
    """The value by which trials are compared here; None for a trial that was never measured."""
    found = [v for v in trial.intermediate_values.values() if math.isfinite(v)]
    if trial.values and math.isfinite(trial.values[0]):
        found.append(trial.values[0])
    return min(found, default=None)


def _varied(trials: Sequence[optuna.trial.FrozenTrial]) -> list[str]:
    """The parameters that have more than one value."""
    names = dict.fromkeys(name for t in trials for name in t.params)
    return [name for name in names if len({t.params[name] for t in trials if name in t.params}) > 1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna says about copies of studies, about its pictures being experimental, and about parameters
    that few trials have."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # A branch that few trials took, or a variant with a value that the space does not have
        warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)


@contextmanager
def _canvas(key: str) -> Iterator[None]:
    """Room for one picture: no window system, and nothing left behind of the style that Optuna sets for the process."""
    import matplotlib
    from matplotlib import pyplot

    backend = matplotlib.get_backend(auto_select=False)
    with matplotlib.rc_context({"svg.hashsalt": key}):  # the same study, the same files
        matplotlib.use("agg")
        try:
            yield
        finally:
            if backend is not None:
                pyplot.switch_backend(backend)


def _figure(drawn: Any, *, width: float = 9.0, height: float = 5.0) -> Figure:
    """The figure that Optuna drew on, as large as a page shows it."""
    axes = drawn.flat[0] if hasattr(drawn, "flat") else drawn
    figure: Figure = axes.get_figure()
    figure.set_size_inches(width, height)
    return figure


def _curves(axes: Any, trials: int) -> Figure:
    axes.set_ylabel(_LOSS)
    axes.set_xlabel("steps")
    if trials > _NAMED and (legend := axes.get_legend()):
        legend.remove()
    return _figure(axes)


def _bars(axes: Any) -> Figure:
    axes.set_xlabel("importance")
    axes.set_ylabel("")
    if legend := axes.get_legend():
        legend.remove()
    return _figure(axes, height=1.6 + 0.5 * len(axes.get_yticks()))


def _parallel(axes: Any, names: Sequence[str]) -> Figure:
    axes.set_xticks(range(len(names)), names)  # Optuna cuts long ones
    for label in axes.get_xticklabels():
        label.set(rotation=20, horizontalalignment="right")
    return _figure(axes, width=11.0, height=5.6)


def _slice(axes: Any) -> Figure:
    for each in axes.flat if hasattr(axes, "flat") else [axes]:
        each.tick_params(axis="x", rotation=30)
    return _figure(axes, width=11.0, height=4.4)


def _save(figure: Figure, picture: Picture, path: Path) -> None:
    from matplotlib import pyplot

    for axes in figure.axes:
        for place in ("left", "center", "right"):
            axes.set_title("", loc=place)
    figure.suptitle(picture.title, x=0.5, fontsize=14)
    try:
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    finally:
        pyplot.close(figure)


def _page(study: optuna.Study, pictures: Sequence[Picture], folder: Path) -> str:
    """One file that needs no other: MLflow's viewer shows a page without the files beside it."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    )
    shown = [
        {
            "title": picture.title,
            "says": picture.says,
            "data": base64.b64encode((folder / f"{picture.name}.svg").read_bytes()).decode(),
        }
        for picture in pictures
    ]
    trials = sum(_lowest(t) is not None for t in _once(study))
    return template.render(study=study.study_name, trials=trials, pictures=shown)
