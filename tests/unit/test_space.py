"""Spaces as Optuna draws them: every draw trains, conditions hold, and what was drawn can be drawn again."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from pipelines.config_space import KINDS, Space, clash
from pipelines.tuning import space as spaces
from pipelines.tuning.defaults import FIXED, SMALL, defaults_for
from pipelines.tuning.methods import packable

RSLORA = {"when": {"use_rslora": True}, "then": [8, 16], "else": {"low": 16, "high": 32, "log": False}}
# Everything that hangs on something else, at once
TANGLED: dict[str, Any] = {
    "use_rslora": [False, True],
    "use_dora": [False, True],
    "init_lora_weights": [True, "pissa"],
    "lora_alpha": RSLORA,
    "learning_rate": {
        "when": {"init_lora_weights": "pissa"},
        "then": {"low": 1e-5, "high": 1e-3, "log": True},
        "else": {"low": 1e-4, "high": 1e-2, "log": True},
    },
    "layers_to_transform": ["all", "top_half", [0, 2]],
}
SPACES = st.sampled_from(
    [
        {},
        TANGLED,
        {"init_lora_weights": [True, "pissa"], "r": {"when": {"lora_dropout": 0.1}, "then": 64, "else": [4, 8]},
         "lora_dropout": [0.1, 0]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": [True, "pissa"], "lora_dropout": {"low": 0, "high": 0.2}},
        {"use_dora": [True, False], "init_lora_weights": {"when": {"use_dora": True}, "then": True, "else": "pissa"}},
        {"init_lora_weights": ["pissa", True], "use_dora": {"when": {"init_lora_weights": True}, "then": [True, False],
                                                            "else": False}},
        {"target_modules": [["q_proj"], "mlp"], "r": {"when": {"target_modules": ["q_proj"]}, "then": 64, "else": [4]}},
    ]
)  # fmt: skip


def full(**named: Any) -> dict[str, Any]:
    return Space(**named).full(135_000_000)


def any_value(data: st.DataObject, asked: dict[str, Any], name: str, distribution: BaseDistribution) -> Any:
    assert name not in asked
    if isinstance(distribution, CategoricalDistribution):
        asked[name] = data.draw(st.sampled_from(distribution.choices))
    elif isinstance(distribution, IntDistribution):
        asked[name] = data.draw(st.integers(distribution.low, distribution.high))
    else:
        assert isinstance(distribution, FloatDistribution)
        asked[name] = data.draw(st.floats(distribution.low, distribution.high))
    return asked[name]


@given(st.data(), SPACES)
def test_what_is_drawn_is_whole_and_trains_and_can_be_drawn_again(data: st.DataObject, named: dict[str, Any]) -> None:
    space, asked = full(**named), {}
    params = spaces.draw(space, lambda name, distribution: any_value(data, asked, name, distribution))
    assert params.keys() == KINDS.keys()
    assert clash(params) is None
    Space(**{name: [value] if isinstance(value, list) else value for name, value in params.items()})
    assert spaces.drawable(space, params) == asked
    assert spaces.draw(space, lambda name, _: asked[name]) == params
    assert asked.keys() <= spaces.distributions(space).keys()


def test_optuna_draws_a_tangled_space_and_goes_on_with_it_from_its_store(tmp_path: Any) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    store, space = f"sqlite:///{tmp_path / 'optuna.db'}", full(**TANGLED)
    optuna.create_study(storage=store, study_name="s")
    drawn = []
    for number in range(50):
        if number % 10 == 0:  # as when a coordinator starts again
            study = optuna.load_study(storage=store, study_name="s")
        study.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
        trial = study.ask()
        params = spaces.draw(space, trial._suggest)
        again = spaces.draw(space, optuna.trial.Trial(study, trial._trial_id)._suggest)
        assert again == params
        drawn.append(params)
        study.tell(trial, params["learning_rate"] + params["r"] / 100)
    assert all(clash(params) is None for params in drawn)
    for params in drawn:
        assert params["lora_alpha"] in (8, 16) if params["use_rslora"] else 16 <= params["lora_alpha"] <= 32
        assert params["learning_rate"] < (1e-3 if params["init_lora_weights"] == "pissa" else 1e-2)
    for name in ("use_rslora", "use_dora", "init_lora_weights"):
        assert len({params[name] for params in drawn}) == 2
    assert any(params["layers_to_transform"] == [0, 2] for params in drawn)
    # Each name of Optuna's was asked for with one distribution
    for trial in study.trials:
        for name, distribution in trial.distributions.items():
            assert spaces.distributions(space)[name] == distribution


def test_branches_have_names_of_their_own() -> None:
    found = spaces.distributions(full(use_rslora=[False, True], lora_alpha=RSLORA))
    assert found["lora_alpha[use_rslora=true]"] == CategoricalDistribution([8, 16])
    assert found["lora_alpha[use_rslora!=true]"] == FloatDistribution(16, 32)
    assert "lora_alpha" not in found
    by_modules = {"when": {"target_modules": ["v_proj", "q_proj"]}, "then": [64, 32], "else": 8}
    found = spaces.distributions(full(target_modules=["mlp", ["q_proj", "v_proj"]], r=by_modules))
    assert found["r[target_modules=[q_proj, v_proj]]"] == CategoricalDistribution([64, 32])
    assert "r[target_modules!=[q_proj, v_proj]]" not in found


def test_a_warm_start_is_drawn_first_as_far_as_the_space_has_it() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = full(use_rslora=[False, True], lora_alpha=RSLORA, r=[8, 16])
    # Of a study that knew nothing of rsLoRA, with a rank that is not in this space
    earlier = {"r": 4, "lora_alpha": 24.0, "lora_dropout": 0.05, "learning_rate": 5e-4, "target_modules": "attention"}
    wanted = spaces.drawable(space, earlier)
    assert wanted == {
        "use_rslora": False,
        "lora_alpha[use_rslora!=true]": 24.0,
        "lora_dropout": 0.05,
        "learning_rate": 5e-4,
        "target_modules": "attention",
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(wanted)
    params = spaces.draw(space, study.ask()._suggest)
    assert params | earlier == params | {"r": 4}
    assert params["r"] in (8, 16)
    # What it depends on is not in the space, so neither branch is asked for
    other = full(target_modules=["mlp", "attention"], r={"when": {"target_modules": "mlp"}, "then": [4, 8], "else": 4})
    assert "r[target_modules=mlp]" not in spaces.drawable(other, {"target_modules": "all-linear", "r": 8})


def test_a_study_older_than_a_dimension_goes_on_without_it() -> None:
    space = {"r": [4, 8], "lora_alpha": 16, "target_modules": [["v_proj", "q_proj"]]}
    assert spaces.draw(space, lambda name, distribution: 8) == FIXED | {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["v_proj", "q_proj"],
    }


def test_what_the_file_leaves_out_is_of_the_bases_size() -> None:
    space = Space(r=[2, 4], use_dora=True)
    assert Space().model_dump() == SMALL == defaults_for(999_999_999)
    for parameters in (135_000_000, 7_000_000_000, 70_000_000_000):
        found = space.full(parameters)
        assert (found["r"], found["use_dora"]) == ([2, 4], True)
        assert found.keys() == KINDS.keys()
        assert Space(**found).full(1) == found
    rates = [defaults_for(size)["learning_rate"]["high"] for size in (10**8, 10**9, 10**10, 10**10 + 1)]
    assert rates == [5e-3, 2e-3, 2e-3, 1e-3]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ({}, True),
        ({"init_lora_weights": [True, "pissa"], "lora_dropout": 0.0}, True),
        ({"use_dora": [False, True]}, True),
        ({"use_dora": {"when": {"r": 8}, "then": True, "else": False}, "r": [4, 8]}, True),
        ({"use_dora": [True, False], "init_lora_weights": {"when": {"use_dora": True}, "then": True, "else": "pissa"},
          "lora_dropout": 0.0}, False),
        ({"use_dora": True}, False),
    ],
)  # fmt: skip
def test_a_typical_configuration_can_train_beside_others_where_any_can(named: dict[str, Any], found: bool) -> None:
    space = full(**named)
    params = spaces.typical(space, packable)
    assert packable(params) is found
    middle = spaces.typical(space)
    assert {name for name in params if params[name] != middle[name]} <= {"use_dora", "init_lora_weights", "r"}
    assert spaces.draw(space, lambda name, _: spaces.drawable(space, params)[name]) == params


def test_all_configurations_of_a_space_are_told_where_they_have_an_end() -> None:
    space = full(
        use_rslora=[False, True], lora_alpha={"when": {"use_rslora": True}, "then": [8, 16], "else": 32},
        r={"low": 4, "high": 6}, target_modules=[["q_proj"], "mlp"], lora_dropout=0.0, learning_rate=1e-3,
        lr_scheduler_type="linear", per_device_train_batch_size=8,
    )  # fmt: skip
    found = spaces.every(space, 18)
    assert found is not None
    assert len(found) == 3 * 3 * 2
    assert len({str(params) for params in found}) == 18
    for params in found:
        assert spaces.draw(space, lambda name, _, params=params: spaces.drawable(space, params)[name]) == params  # type: ignore[misc]
    assert spaces.every(space, 17) is None
    assert spaces.every(space | {"learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}}, 10**6) is None


def test_every_default_space_can_draw_pissa_and_dora() -> None:
    for parameters in (10**8, 7 * 10**9, 7 * 10**10):
        for named in ({"init_lora_weights": "pissa"}, {"use_dora": True}):
            space = Space(**named).full(parameters)
            params = spaces.draw(space, lambda name, d: d.choices[-1] if hasattr(d, "choices") else d.low)
            assert clash(params) is None


@pytest.mark.parametrize(
    ("wanted", "count", "found"),
    [("all", 5, None), ("top_half", 4, [2, 3]), ("top_half", 5, [2, 3, 4]), ("top_half", 1, [0]), ([0, 3], 4, [0, 3])],
)
def test_layers_as_peft_wants_them(wanted: Any, count: int, found: Any) -> None:
    assert spaces.layers(wanted, count) == found


def test_a_layer_that_the_base_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="has layer 4, but this base's layers are 0 to 3"):
        spaces.layers([1, 4], 4)
