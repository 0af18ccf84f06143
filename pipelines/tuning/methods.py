"""LoRA adapters on a frozen base, as PEFT makes, saves and loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAME = "default"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "out_proj", "dense")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "dense_h_to_4h", "dense_4h_to_h")


class Adapter:
    """One trainable adapter in a base model, fp32 whatever the base's dtype. `remove` gives the base back as it was.

    `params` are a trial's: r, lora_alpha, lora_dropout, target_modules.
    """

    def __init__(self, model: Any, params: Mapping[str, Any], *, seed: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)  # A is drawn at random
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=int(params["r"]),
            lora_alpha=params["lora_alpha"],
            lora_dropout=float(params["lora_dropout"]),
            target_modules=targets(model, params["target_modules"]),
        )
        self.base = model
        self.peft = get_peft_model(model, config, adapter_name=_NAME)
        self.parameters = {n: p for n, p in self.peft.named_parameters() if p.requires_grad}
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name} is {parameter.dtype}: AdamW needs fp32 adapters")

    def load(self, folder: Path) -> None:
        """Take an adapter's weights; its rank and targets must be this one's."""
        import torch
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        result = set_peft_model_state_dict(self.peft, {k: v.to(torch.float32) for k, v in state.items()}, _NAME)
        if result.unexpected_keys or len(state) != len(self.parameters):
            raise ValueError(f"the adapter in {folder} does not fit: other target modules or rank")

    def save(self, folder: Path) -> None:
        """Plain PEFT: adapter_config.json and adapter_model.safetensors."""
        self.peft.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

    def remove(self) -> None:
        self.peft.unload()


def targets(model: Any, wanted: str | list[str]) -> str | list[str]:
    """`attention`, `mlp`, `all-linear` or names, as PEFT's ``target_modules`` for this model."""
    import torch

    if isinstance(wanted, list) or wanted == "all-linear":
        return wanted
    names = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    found = sorted(names & set(_ATTENTION if wanted == "attention" else _MLP))
    if not found:
        raise ValueError(f"this base has no {wanted} layers by a known name; there are {', '.join(sorted(names))}")
    return found


def fixed_by(folder: Path) -> dict[str, Any]:
    """The dimensions that an adapter to start from fixes. Raises ValueError when it is not a plain LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ValueError(f"the adapter in {folder} is not a plain LoRA")
    modules = config["target_modules"]
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": [sorted(modules)] if isinstance(modules, list) else modules,
    }
