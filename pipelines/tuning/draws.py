"""What the sampler sees when it draws: a function of the rung jobs alone, whoever was faster.

Optuna's own storage shows a sampler whatever was told by then. Here each draw gets a study in memory that holds the
results which the plan allows it, so that a search draws the same configurations on one worker or many, killed or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from infra import storage
from pipelines.tuning import space as spaces
from registry import studies


class Seen(BaseSampler):  # type: ignore[misc]  # Optuna is seen as untyped
    """A sampler for one trial, which looks at `jobs` (results) and `begun` (configurations that are under way, which
    it keeps away from) instead of the study that asks."""

    def __init__(
        self, kind: str, seed: int, number: int, space: Mapping[str, Any], jobs: Iterable[studies.Job],
        begun: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        draw = int(storage.text_digest(f"{seed} {number}")[7:15], 16)
        self._inner: BaseSampler = (
            RandomSampler(seed=draw) if kind == "random" else TPESampler(seed=draw, constant_liar=True)
        )
        self._shadow = optuna.create_study(sampler=self._inner)
        by_trial: dict[int, list[studies.Job]] = {}
        for job in jobs:
            by_trial.setdefault(job.trial, []).append(job)
        seen = [_result(space, by_trial[trial]) for trial in sorted(by_trial)]
        seen += [_trial(space, params, TrialState.RUNNING) for params in begun]
        self._shadow.add_trials([trial for trial in seen if trial is not None])

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        asking = _trial({}, {}, TrialState.RUNNING)
        asking.number = -1  # none of the shadow's: those in it are others
        return self._inner.sample_independent(self._shadow, asking, param_name, param_distribution)


def _result(space: Mapping[str, Any], jobs: Sequence[studies.Job]) -> FrozenTrial | None:
    """A trial's course as a pruned one: TPE ranks those by how far they came, then by their last value."""
    course = {job.steps: job.value for job in jobs if job.value is not None}
    return _trial(space, jobs[0].params, TrialState.PRUNED, course) if course else None


def _trial(
    space: Mapping[str, Any], params: Mapping[str, Any], state: TrialState, course: Mapping[int, float] | None = None
) -> FrozenTrial:
    drawn = spaces.drawable(space, params)
    known = spaces.distributions(space)
    return create_trial(
        state=state,
        params=drawn,
        distributions={name: known[name] for name in drawn},
        intermediate_values=dict(course or {}),
    )
