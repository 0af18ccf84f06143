"""How well a scorer that stands for people's judgement agrees with people, on a set that they labelled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def agreement(file: Path, scorer: Callable[[Mapping[str, Any]], bool], label: str) -> dict[str, Any]:
    """Of the labelled lines of a JSONL file, as `agree`: how far the scorer says what `label` says."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {"set": file.name, **agree([(scorer(line), bool(line[label])) for line in lines])}


def agree(said: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Of pairs of what a scorer and what people say: ``{"n", "agreement", "kappa"}``, the share that is equal, and
    Cohen's kappa (1960), which takes off what chance would give."""
    share = sum(a == b for a, b in said) / len(said)
    ours, theirs = (sum(pair[side] for pair in said) / len(said) for side in (0, 1))
    chance = ours * theirs + (1 - ours) * (1 - theirs)
    kappa = (share - chance) / (1 - chance) if chance < 1 else 1.0
    return {"n": len(said), "agreement": share, "kappa": kappa}
