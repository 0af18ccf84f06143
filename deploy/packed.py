"""A base's weights laid out once as the processor's products want them, and not anew for each.

oneDNN multiplies bfloat16 with weights in blocks, and torch hands it plain ones, which it lays out again each time: of
a few rows, as decoding has them, that takes as long as the product. The results are the same bit by bit. It costs a
second copy of the weights; the first one is the file's own pages, which the kernel may take back.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_ROWS = 8  # that the layout is made for; products of others are as right


def pack(model: Any) -> bool:
    """Pack a frozen model's linear layers, where they are in bfloat16 on a processor that multiplies in it and memory
    has room for twice as much; whether it did. Answers do not change by it."""
    import torch

    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    needed = sum(layer.weight.nbytes for layer in layers)
    if psutil.virtual_memory().available < 2 * needed:
        log.info("weights are not packed: there is no room for %.1f GB", needed / 1e9)
        return False
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS) for layer in layers]
        with torch.inference_mode():
            probe = torch.ones(_ROWS, layers[0].in_features, dtype=torch.bfloat16)
            same = torch.equal(_product(packed[0], layers[0].bias, probe), layers[0](probe))
    except (AttributeError, RuntimeError) as error:  # torch makes no promises about these
        log.info("weights are not packed: %s", str(error).splitlines()[0])
        return False
    if not same:
        log.info("weights are not packed: products would differ")
        return False
    for layer, weight in zip(layers, packed, strict=True):
        vars(layer)["forward"] = partial(_product, weight, layer.bias)
    return True


def _product(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    import torch

    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
