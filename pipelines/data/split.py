"""Which group of rows goes to which split: by a hash of the group, so that more rows leave the others in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from infra.errors import UsageError
from registry.datasets import SPLITS, Split

# Fewer rows than these teach and tell nothing; the gate says how many a judgement needs.
LEAST: Mapping[Split, int] = {"train": 8, "validation": 2, "test": 2}


def position(key: str, seed: int) -> float:
    """Where a group stands between 0 and 1; uniform over groups, the same for ever."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def assign(sizes: Mapping[str, int], *, validation: float, test: float, seed: int) -> dict[str, Split]:
    """The split of each group, given its number of rows.

    Groups below `test` go to test, the next `validation` of them to validation, the others to train; a share of
    0 gives that split nothing. A group with more than a quarter of a split's wanted rows stays in train, since it
    would be most of what the split says. Where chance gives a split fewer than LEAST rows, the smallest groups
    fill it up.
    """
    total = sum(sizes.values())
    shares: dict[Split, float] = {"test": test, "validation": validation}
    places: dict[str, Split] = {}
    line = sorted(sizes, key=lambda key: position(key, seed))
    for key in line:
        at, begin = position(key, seed), 0.0
        places[key] = "train"
        for split, share in shares.items():
            if begin <= at < begin + share and sizes[key] <= max(1.0, share * total / 4):
                places[key] = split
            begin += share
    for split, share in shares.items():
        rows = sum(sizes[key] for key in line if places[key] == split)
        for key in sorted(line, key=lambda key: (max(sizes[key], LEAST["test"]), position(key, seed))):
            if share == 0 or rows >= LEAST[split]:
                break
            if places[key] == "train":
                places[key] = split
                rows += sizes[key]
    return places


def require(counts: Mapping[Split, int], where: str) -> None:
    """Raises UsageError when a split has too few rows to go on with."""
    for split in SPLITS:
        if counts[split] < LEAST[split]:
            found = ", ".join(f"{counts[name]} {name}" for name in SPLITS)
            raise UsageError(
                f"Too few rows: {where} leave {found}, and {split} needs at least {LEAST[split]}.",
                hint="Add examples; a few hundred are a good beginning.",
            )
