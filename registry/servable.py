"""May an engine serve an adapter on its base? Looked at in the files, before a version is registered.

The limits are vLLM's too: LoRA and rsLoRA, of a rank up to ``TUNESMITH_MAX_LORA_RANK``, on linear layers of the base,
and nothing beside them. DoRA is served by our own engine only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.settings import get_settings

_MATRIX = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_magnitude_vector.*)")
_HINT = "Nothing was registered."
PLAIN = (
    "Train a plain LoRA, without biases; what began as PiSSA or OLoRA is saved converted (PEFT: "
    "path_initial_model_for_weight_conversion)."
)
# What LoraConfig can ask for beyond B(A(x)) * scale and DoRA. Each would be served wrongly, so each is refused.
_BEYOND = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
)
# Other initialisations (pissa, olora, corda, loftq) move the base's own weights while training.
_HEADS = ("lm_head", "embed_out")
_SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def check(adapter: Path, base: Path) -> int:
    """The adapter's highest rank. `adapter` and `base` are folders in the forms of PEFT and transformers.

    Raises Refused for a configuration that asks for more than LoRA, a rank above the limit, and for a tensor that is no
    low-rank matrix of a linear layer of this base, or not of its shape.
    """
    if (config := _config(adapter)) and (why := beyond_lora(config)) is not None:
        raise Refused(f"The adapter cannot be served: it {why}.", hint=PLAIN)
    most = get_settings().max_lora_rank
    weights = {name: shape for file in sorted(base.glob("*.safetensors")) for name, shape in _shapes(file).items()}
    highest = 0
    for name, shape in sorted(_shapes(adapter / "adapter_model.safetensors").items()):
        match = _MATRIX.fullmatch(name)
        if match is None:
            raise Refused(f"The adapter cannot be served: {name[:200]!r} is no low-rank matrix of a layer.", hint=_HINT)
        layer, side = match["layer"], match["side"]
        weight = weights.get(f"{layer}.weight")
        if layer.rpartition(".")[2] in _HEADS:
            raise Refused(
                f"The adapter cannot be served: it changes {layer}, and engines here take no adapter of the output.",
                hint=f"Leave that out of target_modules. {_HINT}",
            )
        if weight is None or len(weight) != 2:
            raise Refused(f"The adapter cannot be served: its base has no linear layer {layer[:200]}.", hint=_HINT)
        if side is None:
            continue
        rank, own, wanted = (shape[0], shape[1:], weight[1:]) if side == "A" else (shape[-1], shape[:1], weight[:1])
        if len(shape) != 2 or own != wanted:
            raise Refused(
                f"The adapter cannot be served: its {side} of {layer} is {shape}, and the base's weight {weight}.",
                hint=f"It was made for another base. {_HINT}",
            )
        if not 1 <= rank <= most:
            raise Refused(
                f"The adapter cannot be served: its rank at {layer} is {rank}, and engines here take {most} at most.",
                hint=f"Search lower ranks, or raise TUNESMITH_MAX_LORA_RANK and the engines' own limit. {_HINT}",
            )
        highest = max(highest, rank)
    if not highest:
        raise Refused("The adapter cannot be served: it holds no matrices.", hint=_HINT)
    return highest


def beyond_lora(config: Mapping[str, Any]) -> str | None:
    """What an adapter's configuration asks for that no engine serves, as the rest of a sentence; None of a LoRA."""
    for option in _BEYOND:
        if config.get(option):
            return f"uses {option}, which is not served"
    if config.get("bias", "none") != "none":
        return "also trains biases, which are not served"
    if config.get("init_lora_weights", True) not in _SAME_BASE:
        return f"was initialised by {config['init_lora_weights']}, which changes the base"
    return None


def _config(adapter: Path) -> dict[str, Any]:
    """Its adapter_config.json; nothing of one that cannot be read, which others refuse."""
    try:
        found = json.loads((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shapes(file: Path) -> Mapping[str, list[int]]:
    """The tensors of a safetensors file, by its header alone."""
    with file.open("rb") as opened:
        header: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
