"""How a configuration becomes an adapter: which layers it is for, and the methods that train alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import UsageError
from pipelines.tuning import space as spaces

_NAME = "default"
_FROM_BASE = "Begin with the base: `tuning: {start_from: base}`, or `retrain: {start_from: base}`."
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "out_proj", "dense")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "dense_h_to_4h", "dense_4h_to_h")


def packable(params: Mapping[str, Any]) -> bool:
    """Whether a configuration can train beside others. DoRA's layers need the base's weights in their gradient, and
    PiSSA changes the base: those two train alone."""
    return not params.get("use_dora") and params.get("init_lora_weights", True) is True


class Targets:
    """Which layers of one base an adapter is for, as PEFT itself chooses them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[str, tuple[list[str], list[str]]] = {}  # what was asked for -> modules, layers

    def layers(self, params: Mapping[str, Any]) -> list[str]:
        """The full names of the linear layers, in the model's order."""
        return self._choose(params)[1]

    def config(self, params: Mapping[str, Any]) -> Any:
        """The adapter's configuration as PEFT keeps it."""
        return lora_config(self.model, params, target_modules=set(self._choose(params)[0]), inference_mode=True)

    def check_pissa(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError when a layer has fewer singular values than PiSSA is to take of it."""
        for name in self.layers(params):
            least = min(self.model.get_submodule(name).weight.shape)
            if int(params["r"]) > least:
                raise ValueError(f"PiSSA of rank {params['r']} asks more of {name} than its {least} singular values")

    def _choose(self, params: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        from peft import get_peft_model
        from peft.tuners.lora import Linear

        key = json.dumps([params["target_modules"], params.get("layers_to_transform", "all")])
        if key not in self._known:
            asked = {name: params[name] for name in ("target_modules", "layers_to_transform") if name in params}
            peft = get_peft_model(self.model, lora_config(self.model, asked | {"r": 1, "lora_alpha": 1}))
            try:
                modules = sorted(peft.peft_config[_NAME].target_modules)
                named = peft.base_model.model.named_modules()
                self._known[key] = (modules, [name for name, part in named if isinstance(part, Linear)])
            finally:
                peft.unload()
        return self._known[key]


def lora_config(model: Any, params: Mapping[str, Any], **more: Any) -> Any:
    """A trial's params as PEFT's LoraConfig for this base."""
    from peft import LoraConfig

    layers = spaces.layers(params.get("layers_to_transform", "all"), model.config.get_text_config().num_hidden_layers)
    wanted = targets(model, params["target_modules"])
    if wanted == "all-linear" and layers is not None:  # PEFT takes numbers of layers only with names of modules
        wanted = _linears(model)
    values: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        "r": int(params["r"]),
        "lora_alpha": params["lora_alpha"],
        "lora_dropout": float(params.get("lora_dropout", 0.0)),
        "use_rslora": bool(params.get("use_rslora", False)),
        "use_dora": bool(params.get("use_dora", False)),
        "init_lora_weights": params.get("init_lora_weights", True),
        "target_modules": wanted,
        "layers_to_transform": layers,
    }
    return LoraConfig(**values | more)


class Alone:
    """One adapter as PEFT trains it: DoRA, or PiSSA, whose change of the base is taken back at the end.

    The same face as `Pack` has, for a pack of one.
    """

    def __init__(self, model: Any, params: Mapping[str, Any], seed: int) -> None:
        import torch
        from peft import get_peft_model

        self.model, self.params, self.seed = model, params, seed
        torch.manual_seed(seed)  # A is drawn at random
        self._changes_base = str(params.get("init_lora_weights", True)).startswith("pissa")
        kept = {name: value.clone() for name, value in model.state_dict().items()} if self._changes_base else {}
        self.peft = get_peft_model(model, lora_config(model, params), adapter_name=_NAME)
        self._kept = kept
        self.parameters = {n: p for n, p in self.peft.named_parameters() if p.requires_grad}
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name} is {parameter.dtype}: AdamW needs fp32 adapters")
        self._first = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=1.0, weight_decay=float(params["weight_decay"])
        )

    def __len__(self) -> int:
        return 1

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Gives the base back as it was."""
        try:
            yield
        finally:
            self.peft.unload()
            if self._kept:
                self.model.load_state_dict(self._kept)

    def changed(self) -> None:
        """Nothing is copied."""

    def begin_step(self, step: int, *, mix: Any) -> None:
        import torch

        torch.manual_seed(mix(self.seed, step))  # dropout's masks

    def step(self, k: int, *, rate: float, max_norm: float) -> float:
        import torch

        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), max_norm))
        if math.isfinite(norm):
            self._optimizer.param_groups[0]["lr"] = rate
            self._optimizer.step()
        return norm

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def drop(self, k: int) -> None:
        """It is the only one: nobody is left to disturb."""

    def save(self, k: int, folder: Path) -> int:
        """Plain PEFT; returns how many numbers it has. PiSSA is converted to a LoRA of twice the rank on the unchanged
        base (Meng et al. 2024)."""
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        state = get_peft_model_state_dict(self.peft, adapter_name=_NAME)
        config = self.peft.peft_config[_NAME]
        values = config.to_dict()
        if self._changes_base:
            # W + s(B A - B0 A0) as one product: A over A0, B beside -B0; alpha grows with r, so that s stays
            first = {name.replace(f".{_NAME}.", "."): value for name, value in self._first.items()}
            state = {
                name: torch.cat([value, first[name]]) if "lora_A" in name else torch.cat([value, -first[name]], 1)
                for name, value in state.items()
            }
            twice = 2 if not config.use_rslora else math.sqrt(2)
            values |= {"r": 2 * config.r, "lora_alpha": config.lora_alpha * twice, "init_lora_weights": True}
        type(config)(**values | {"inference_mode": True}).save_pretrained(folder)
        tensors = {name: value.contiguous() for name, value in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return sum(part.numel() for part in tensors.values())

    def load(self, k: int, folder: Path) -> None:
        """Take an adapter's weights; its rank and targets must be this one's."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        result = set_peft_model_state_dict(self.peft, state, _NAME)
        if result.unexpected_keys or len(state) != len(self.parameters):
            raise ValueError(f"the adapter in {folder} does not fit: other target modules or rank")

    def save_moments(self, k: int, folder: Path) -> None:
        """What AdamW remembers, and the parameters themselves: what `save` writes may be a conversion."""
        from safetensors.torch import save_file

        state = {f"value.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for which in ("exp_avg", "exp_avg_sq"):
                state[f"{which}.{name}"] = self._optimizer.state[parameter][which]
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "optimizer.safetensors")

    def load_moments(self, k: int, folder: Path, step: int) -> None:
        import torch
        from safetensors.torch import load_file

        state = load_file(folder / "optimizer.safetensors", device=str(self.model.device))
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[f"value.{name}"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": state[f"exp_avg.{name}"],
                "exp_avg_sq": state[f"exp_avg_sq.{name}"],
            }


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


def _linears(model: Any) -> list[str]:
    """The names of all linear layers but the head, as PEFT's all-linear means them."""
    import torch

    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and part is not head
    }
    return sorted(found)


def fixed_by(folder: Path) -> dict[str, Any]:
    """The dimensions that an adapter to start from fixes. Raises UsageError when no trial could go on from it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    beyond = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)]
    if config.get("peft_type") != "LORA" or beyond:
        what = f"it has {', '.join(beyond)}" if beyond else f"it is {config.get('peft_type')}"
        raise UsageError(f"Training cannot go on from the adapter in {folder}: {what}.", hint=_FROM_BASE)
    modules, layers = config["target_modules"], config.get("layers_to_transform")
    if isinstance(modules, str) and modules != "all-linear":
        why = "its target_modules are a pattern"
        raise UsageError(f"Training cannot go on from the adapter in {folder}: {why}.", hint=_FROM_BASE)
    if isinstance(layers, int):
        layers = [layers]
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": False,
        "init_lora_weights": True,
        "target_modules": [sorted(modules)] if isinstance(modules, list) else modules,
        "layers_to_transform": "all" if layers is None else [layers],
    }
