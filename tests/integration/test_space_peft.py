"""What the space says of PEFT, asked of PEFT itself: which variants go together, and which layers a name means."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pipelines.config_space import clash
from pipelines.tuning.space import layers
from tests.lora import save_base

IDS = torch.arange(24).view(2, 12)
NAMES = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def config(**params: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, "target_modules": NAMES} | params)


def trained_and_reloaded(base: Path, folder: Path, **params: Any) -> float:
    """How far the answers of a trained adapter, saved as a plain one and loaded on a fresh base, are from its own."""
    torch.manual_seed(0)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(**params))
    initial = folder / "initial"
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(initial)
    tuned.peft_config["default"].init_lora_weights = params["init_lora_weights"]
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        tuned(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        own = tuned.eval()(IDS).logits.clone()
        pissa = params["init_lora_weights"] == "pissa"
        tuned.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial) if pissa else None)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        assert plain.peft_config["default"].init_lora_weights is True
        return float((plain(IDS).logits - own).abs().max())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("use_dora", "init"), [(False, True), (True, True), (False, "pissa"), (True, "pissa")])
def test_what_clashes_is_what_peft_saves_wrongly(
    base: Path, tmp_path: Path, use_dora: bool, init: Any, use_rslora: bool
) -> None:
    params = {"use_dora": use_dora, "init_lora_weights": init, "use_rslora": use_rslora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gap = trained_and_reloaded(base, tmp_path, **params)
    assert gap > 0.01 if clash(params) else gap < 1e-4


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_dropout_moves_the_base_itself_where_it_clashes(base: Path, init: Any, lora_dropout: float) -> None:
    params = {"init_lora_weights": init, "lora_dropout": lora_dropout}
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        alone = model(IDS).logits.clone()
    torch.manual_seed(0)
    tuned = get_peft_model(model, config(**params)).train()
    with torch.inference_mode():
        gap = float((tuned(IDS).logits - alone).abs().max())  # before any step
    assert gap > 0.1 if clash(params) else gap < 1e-4


def test_the_top_half_is_what_peft_adapts(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    wanted = layers("top_half", model.config.num_hidden_layers)
    tuned = get_peft_model(model, config(layers_to_transform=wanted))
    adapted = {name.split(".layers.")[1][0] for name, p in tuned.named_parameters() if p.requires_grad}
    assert adapted == {"1"}  # of 0 and 1
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        config(layers_to_transform=wanted, target_modules="all-linear")
