"""Where search workers compute: a GPU each where there are any that torch can use, else a core each."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from infra.processes import cores

_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each, where NVIDIA's driver is loaded


def gpus() -> list[str]:
    """The GPUs of this machine that workers may have, as CUDA_VISIBLE_DEVICES names them: those that this names, or
    all. Found without torch, whose import takes seconds; none when torch is built for the processor alone."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return []
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [str(number) for number in range(len(list(_DRIVER.glob("*"))))]


def workers() -> int:
    """How many workers keep this machine busy."""
    return len(gpus()) or cores()


def mine() -> str:
    """The device of this process, a worker: ``cuda`` is the first one that it may see."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
