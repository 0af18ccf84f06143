"""How well a scorer that stands for people's judgement agrees with people, on a set that they labelled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.statistics import wilson

LEAST_KAPPA = 0.6  # of scorers by words, under which no gate passes by them: "moderate" to Landis and Koch (1977)
LEAST_LABELS = 10  # answers that people labelled, below which agreement with them says too little


def agreement(file: Path, scorer: Callable[[Mapping[str, Any]], bool], label: str) -> dict[str, Any]:
    """Of the labelled lines of a JSONL file, as `agree`: how far the scorer says what `label` says; with who labelled
    them (`labelled_by`), and whether the scorer was made without them (`held_out`), where all lines say so. Raises
    OSError, and ValueError, LookupError or TypeError for lines that are no such labels, or all of one kind."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if {line[label] for line in lines} != {True, False}:
        raise ValueError(f"{file.name} must have lines of either kind, with {label}: true or false")
    by = {line.get("labelled_by") for line in lines}
    return {
        "set": file.name,
        **({"labelled_by": " and ".join(sorted(by))} if None not in by else {}),
        **({"held_out": True} if all(line.get("held_out") for line in lines) else {}),
        **agree([(scorer(line), bool(line[label])) for line in lines]),
    }


def doubted(found: Mapping[str, Any], metrics: Iterable[str], what: str) -> dict[str, str]:
    """Of the metrics that stand on a scorer why no gate may pass by them, as `Finding.doubted`: none where it agrees
    by `LEAST_KAPPA` on `LEAST_LABELS` answers. `what` are the scorer's words."""
    if found["n"] < LEAST_LABELS:
        return dict.fromkeys(metrics, f"{what} are held against {found['n']} labels, under {LEAST_LABELS}")
    if found["kappa"] < LEAST_KAPPA:
        why = f"{what} agree with labels by {kappa_in_words(found)} on {found['n']} answers, under {LEAST_KAPPA:g}"
        return dict.fromkeys(metrics, why)
    return {}


def agree(said: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Of pairs of what a scorer and what people say: ``{"n", "agreement", "kappa", "kappa_low", "kappa_high"}``, the
    share that is equal, and Cohen's kappa (1960), which takes off what chance would give; 0 where both always say the
    same one thing, since that is all chance would give too. Its 95 % interval is
    Cohen's, with what chance gives taken as known, but with Wilson's interval (1927) of the share instead of the
    normal one: a few labels that all agree leave room below 1."""
    share = sum(a == b for a, b in said) / len(said)
    ours, theirs = (sum(pair[side] for pair in said) / len(said) for side in (0, 1))
    chance = ours * theirs + (1 - ours) * (1 - theirs)

    def kappa(agreed: float) -> float:
        return (agreed - chance) / (1 - chance) if chance < 1 else 0.0

    low, high = wilson(share, len(said))
    return {
        "n": len(said), "agreement": share, "kappa": kappa(share), "kappa_low": kappa(low), "kappa_high": kappa(high)
    }  # fmt: skip


def kappa_in_words(found: Mapping[str, Any]) -> str:
    """Such as ``kappa 0.95 [0.80, 0.99]``; without the interval where an older evaluation has none."""
    between = f" [{found['kappa_low']:.2f}, {found['kappa_high']:.2f}]" if "kappa_low" in found else ""
    return f"kappa {found['kappa']:.2f}{between}"


def in_words(found: Mapping[str, Any]) -> str:
    """Such as ``agrees with people on 97 % of 32 labelled examples (kappa 0.94 [0.73, 0.99], toxic.jsonl)``; with who
    labelled them, and that the scorer was made without them, where the set says so."""
    return (
        f"agrees with {found.get('labelled_by', 'people')} on {100 * found['agreement']:.0f} % of {found['n']} "
        f"{'held-out ' if found.get('held_out') else ''}labelled examples ({kappa_in_words(found)}, {found['set']})"
    )
