"""What a configuration is drawn with: a function of the seed, its place and the results that the plan allows it to see.

Optuna's own storage shows a sampler whatever was told by then. Here each draw gets a study in memory, so that a search
draws the same configurations on one worker or many, killed or not.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from infra import storage
from pipelines.tuning import space as spaces
from pipelines.tuning.spec import StudySpec
from registry import halving, studies

_STARTUP = 10  # Optuna's own number of trials that are drawn at random before TPE has something to model
_REDRAWS = 40  # of a configuration that is not wanted, until the space counts as exhausted
_LISTED = 10_000  # unless it has no more configurations than this, which can be gone through


def find(
    spec: StudySpec, place: int, *, seen: Sequence[studies.Job], begun: Sequence[Mapping[str, Any]],
    wanted: Callable[[Mapping[str, Any]], bool],
) -> dict[str, Any] | None:  # fmt: skip
    """A configuration that is wanted for a place in a search, as `draw` has it; None when the space has no more, which
    of one without end is a guess."""
    for again in range(_REDRAWS):
        params = draw(spec, place, again=again, seen=seen, begun=begun)
        if wanted(params):
            return params
    left = [params for params in spaces.every(spec.space, _LISTED) or () if wanted(params)]
    return random.Random(f"{spec.seed} {place}").choice(left) if left else None


def draw(
    spec: StudySpec, place: int, *, again: int = 0, seen: Sequence[studies.Job], begun: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """The configuration for a place, and when that is not wanted, for `again` 1 and so on others.

    It is drawn with what the jobs that can be seen came to, and away from the configurations in `begun`, which are
    under way. Those of the first group, and no more than Optuna has so, are drawn at random, as are the later half of
    redraws: a model may be too sure to find what is left. A warm start is kept as far as the space has it.
    """
    trials = halving.by_trial(seen)
    mixed = int(storage.text_digest(f"{spec.seed} {place}" + (f" {again}" if again else ""))[7:15], 16)
    startup = min(len(halving.brackets(spec)[0]), _STARTUP)
    sampler: BaseSampler
    if spec.sampler == "random" or again >= _REDRAWS // 2 or len(trials) < startup:
        sampler = RandomSampler(seed=mixed)
    else:  # also where trials failed, so that there are fewer results
        with warnings.catch_warnings():  # Optuna 6 is to have no `gamma`, and is not in our range
            warnings.simplefilter("ignore", FutureWarning)
            sampler = TPESampler(seed=mixed, n_startup_trials=1, gamma=good)
    shadow = optuna.create_study(sampler=sampler)
    results = [_result(spec.space, trials[number]) for number in sorted(trials)]
    shadow.add_trials([result for result in results if result is not None])
    shadow.add_trials([_trial(spec.space, params, TrialState.RUNNING) for params in begun])
    if again == 0 and place < len(spec.warm_start):
        shadow.enqueue_trial(spaces.drawable(spec.space, spec.warm_start[place]))
    return spaces.draw(spec.space, shadow.ask()._suggest)


def good(results: int) -> int:
    """How many of so many results TPE is to draw near to: Optuna's tenth, but three where that is a third of them. With
    one of nine, which is what a first group shows, its draws are about as good as random ones."""
    return max(min(math.ceil(0.1 * results), 25), min(results // 3, 3))


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
