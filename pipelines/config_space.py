"""The `tuning.space` section: what is searched, and what values make sense.

A list is a choice, ``{low, high, log}`` a range, a single value is fixed. Names are PEFT's (LoraConfig) and
transformers' (TrainingArguments).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number from `low` to `high`, whole or not."""

    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Name:
    """One of some names."""

    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Which linear layers get an adapter: a name for a group of them, or a list of module names."""

    groups: tuple[str, ...] = ("attention", "mlp", "all-linear")


KINDS: Mapping[str, Number | Name | Modules] = {
    "r": Number(low=1, high=512, whole=True),
    "lora_alpha": Number(low=0.1, high=4096),
    "lora_dropout": Number(low=0, high=0.9),
    "learning_rate": Number(low=1e-8, high=1),
    "lr_scheduler_type": Name(names=("linear", "cosine", "constant")),
    "warmup_ratio": Number(low=0, high=0.9),
    "weight_decay": Number(low=0, high=1),
    "max_grad_norm": Number(low=1e-3, high=1000),
    "target_modules": Modules(),
    "per_device_train_batch_size": Number(low=1, high=1024, whole=True),
}


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """``did you mean 'trials'?``, or the list of what there is."""
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"


def _dimension(value: Any, info: ValidationInfo) -> Any:
    name = info.field_name or ""
    kind = KINDS[name]
    if isinstance(value, Mapping):
        return _range(name, kind, value)
    if not isinstance(value, list | tuple):
        return _choice(kind, value)
    if not value:
        raise ValueError("is an empty list; give at least one choice")
    choices = [_choice(kind, item) for item in value]
    if any(item in choices[:index] for index, item in enumerate(choices)):
        raise ValueError("lists a choice twice; keep one of them")
    return choices


def _range(name: str, kind: Number | Name | Modules, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kind, Number):
        raise ValueError("cannot be a range; give a list of choices")
    form = "a range is {low: 1, high: 9, log: true}"
    if unknown := sorted(set(value) - {"low", "high", "log"}):
        raise ValueError(f"has the unknown key {unknown[0]!r}; {form}")
    if not {"low", "high"} <= set(value):
        raise ValueError(f"needs both low and high; {form}")
    low, high, log = _choice(kind, value["low"]), _choice(kind, value["high"]), value.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false, not {log!r}; {form}")
    if not low < high:
        raise ValueError(f"low ({low:g}) must be under high ({high:g}); for one fixed value write {name}: {low:g}")
    if log and low <= 0:
        raise ValueError("a log range must begin above 0; raise low, or leave log out")
    return {"low": low, "high": high, "log": log}


def _choice(kind: Number | Name | Modules, value: Any) -> Any:
    if isinstance(kind, Number):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number, not {value!r}")
        if kind.whole and value != int(value):
            raise ValueError(f"must be a whole number, not {value!r}")
        if not kind.low <= value <= kind.high:
            raise ValueError(f"must be from {kind.low:g} to {kind.high:g}, not {value!r}")
        return int(value) if kind.whole else value
    if isinstance(kind, Modules) and isinstance(value, list | tuple):
        if value and all(isinstance(item, str) and re.fullmatch(r"\w[\w.]*", item) for item in value):
            return list(value)
        raise ValueError(f"{value!r} is not a list of module names, such as [q_proj, v_proj]")
    names = kind.names if isinstance(kind, Name) else kind.groups
    if value not in names:
        hint = "" if isinstance(kind, Name) else "; single modules are a list of their own: [[q_proj, v_proj]]"
        raise ValueError(f"{value!r} is not known; {did_you_mean(str(value), names)}{hint}")
    return value


Dimension = Annotated[Any, BeforeValidator(_dimension)]


class Space(BaseModel):
    """The dimensions. Defaults: rank and targets as in Hu et al. 2021 (LoRA) and Dettmers et al. 2023 (QLoRA: all
    linear layers), learning rates around ten times those of full fine-tuning (Schulman et al. 2025, "LoRA Without
    Regret")."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: Dimension = [4, 8, 16, 32]
    lora_alpha: Dimension = [16, 32]
    lora_dropout: Dimension = [0.0, 0.05, 0.1]
    learning_rate: Dimension = {"low": 1e-4, "high": 5e-3, "log": True}
    lr_scheduler_type: Dimension = ["cosine", "linear", "constant"]
    warmup_ratio: Dimension = 0.05
    weight_decay: Dimension = 0.0
    max_grad_norm: Dimension = 1.0
    target_modules: Dimension = ["attention", "all-linear"]
    per_device_train_batch_size: Dimension = [4, 8, 16]
