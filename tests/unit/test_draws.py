"""What is drawn: by what can be seen of earlier trials, and the same again whoever asks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import optuna
import pytest

from infra import storage
from pipelines.config_space import Space, clash
from pipelines.tuning import draws
from pipelines.tuning import space as spaces
from pipelines.tuning.spec import StudySpec
from registry.studies import Job

SPEC = StudySpec(
    study="s", model="m", base="b", dataset="d", system=None, max_tokens=9, trials=16, rungs=(6, 18, 54), reduction=3,
    space=Space(learning_rate={"low": 1e-5, "high": 1e-1, "log": True}).full(135_000_000),
)  # fmt: skip
FIRST = range(9)  # its first group


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def loss(params: dict[str, Any]) -> float:
    """As easy as can be: the rate alone counts, and 1e-3 is best."""
    return abs(math.log10(params["learning_rate"]) + 3)


def job(trial: int, params: dict[str, Any], value: float | None, state: str = "done") -> Job:
    return Job(
        study="s", trial=trial, rung=0, trial_id=trial, params=params, pack=trial, steps=6, state=state, token=1,
        attempts=1, worker=None, value=value, curve=None, checkpoint=None, tokens=None, seconds=None,
        adapter_parameters=None, error=None, updated_at=datetime(2026, 11, 24, tzinfo=UTC), clone_of=None,
    )  # fmt: skip


def begun(spec: StudySpec) -> list[Job]:
    """The first group, through its first rung."""
    drawn = [draws.draw(spec, place, seen=[], begun=[]) for place in FIRST]
    return [job(n, params, loss(params)) for n, params in enumerate(drawn)]


def second(spec: StudySpec, seen: list[Job]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for place in range(9, 16):
        found.append(draws.draw(spec, place, seen=seen, begun=found))
    return found


def test_the_second_group_is_drawn_where_the_first_one_did_well() -> None:
    modelled, at_random = [], []
    for seed in range(8):
        spec = replace(SPEC, seed=seed)
        seen = begun(spec)
        by_model, by_chance = second(spec, seen), second(replace(spec, sampler="random"), seen)
        assert all(one != other for one, other in zip(by_model, by_chance, strict=True))
        modelled += [loss(params) for params in by_model]
        at_random += [loss(params) for params in by_chance]
    assert statistics.mean(modelled) < 0.75 * statistics.mean(at_random)


def test_a_draw_is_that_of_optunas_own_sampler() -> None:
    """Of all dimensions together, as its default is."""
    mixed = int(storage.text_digest("0 9")[7:15], 16)
    with pytest.warns(FutureWarning, match="`gamma` has been deprecated"):
        sampler = optuna.samplers.TPESampler(seed=mixed, n_startup_trials=1, gamma=draws.good)
    study = optuna.create_study(sampler=sampler)
    seen = begun(SPEC)
    known = spaces.distributions(SPEC.space)
    for j in seen:
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.PRUNED, params=spaces.drawable(SPEC.space, j.params),
                distributions=known, intermediate_values={6: j.value},
            )
        )  # fmt: skip
    trial = study.ask()
    assert trial.relative_params.keys() == known.keys()
    assert draws.draw(SPEC, 9, seen=seen, begun=[]) == spaces.draw(SPEC.space, trial._suggest)


def test_trials_that_failed_are_no_reason_to_draw_at_random() -> None:
    seen = begun(SPEC)
    seen[4] = replace(seen[4], value=None, state="failed")
    assert second(SPEC, seen)[0] != second(replace(SPEC, sampler="random"), seen)[0]
    # But fewer than the first group are: it is drawn at random whatever can be seen
    assert second(SPEC, seen[:8]) == second(replace(SPEC, sampler="random"), seen[:8])


def test_a_draw_depends_on_nothing_but_seed_place_and_what_is_seen() -> None:
    seen = begun(SPEC)
    assert second(SPEC, seen) == second(SPEC, seen[::-1])
    assert len({str(params) for params in second(SPEC, seen)}) == 7
    assert second(replace(SPEC, seed=1), seen) != second(SPEC, seen)


def test_dimensions_that_hang_on_others_are_drawn_by_model_too() -> None:
    tangled = replace(
        SPEC,
        space=Space(
            use_rslora=[False, True],
            init_lora_weights=[True, "pissa"],
            lora_alpha={"when": {"use_rslora": True}, "then": [8, 16], "else": {"low": 16, "high": 32, "log": False}},
            learning_rate={"low": 1e-5, "high": 1e-1, "log": True},
            target_modules=[["q_proj", "v_proj"], "all-linear"],
        ).full(135_000_000),
    )
    modelled, at_random = [], []
    for seed in range(8):
        spec = replace(tangled, seed=seed)
        seen = begun(spec)
        found = second(spec, seen)
        assert found == second(spec, seen)
        assert all(clash(params) is None for params in found)
        for params in found:
            assert params["lora_alpha"] in (8, 16) if params["use_rslora"] else 16 <= params["lora_alpha"] <= 32
        modelled += [loss(params) for params in found]
        at_random += [loss(params) for params in second(replace(spec, sampler="random"), seen)]
    assert statistics.mean(modelled) < 0.8 * statistics.mean(at_random)


def test_a_warm_start_has_the_first_places() -> None:
    warm = [{"learning_rate": 2e-3, "r": 8}, {"learning_rate": 1.0, "r": 16}]  # the second rate is not in the space
    spec = replace(SPEC, warm_start=warm)
    first, other, third = (draws.draw(spec, place, seen=[], begun=[]) for place in range(3))
    assert (first["learning_rate"], first["r"], other["r"]) == (2e-3, 8, 16)
    assert other["learning_rate"] <= 1e-1
    assert third == draws.draw(SPEC, 2, seen=[], begun=[])
    assert draws.draw(spec, 0, again=1, seen=[], begun=[]) == draws.draw(SPEC, 0, again=1, seen=[], begun=[])


def _all_but(*kept: int) -> Callable[[Any], bool]:
    return lambda params: params["r"] in kept


def test_the_last_configuration_of_a_space_is_found() -> None:
    fixed = {name: form[0] if isinstance(form, list) else form for name, form in SPEC.space.items()}
    spec = replace(SPEC, space=fixed | {"r": {"low": 1, "high": 256, "log": False}, "learning_rate": 1e-3})
    found = [draws.find(replace(spec, seed=seed), 0, seen=[], begun=[], wanted=_all_but(137)) for seed in range(9)]
    assert [params and params["r"] for params in found] == [137] * 9
    assert draws.find(spec, 0, seen=[], begun=[], wanted=_all_but()) is None
    assert {
        str(draws.find(replace(spec, seed=seed), 0, seen=[], begun=[], wanted=_all_but(7, 137))) for seed in range(9)
    } == {str({**spaces.every(spec.space, 300)[n], "r": n + 1}) for n in (6, 136)}  # type: ignore[index]
    endless = replace(spec, space=spec.space | {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}})
    assert draws.find(endless, 0, seen=[], begun=[], wanted=_all_but()) is None
