"""Which rows that are learned from also stand in rows that judge: exactly, or nearly (fault 23).

Such rows are left out of training, and yet they are told of, and the gate fails: a team that keeps its test rows in a
file of their own believes the two to be apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.data.dedup import Alike, standing_in
from registry.datasets import SPLITS, Dataset, Row, Split, normalise

_EXAMPLES = 10
_SHORT = 60  # characters of a suite's text that are shown
_LEAST = 20  # characters of a question that are no coincidence in a prompt
_RANK: Mapping[Split | None, int] = {"test": 2, "validation": 1, "train": 0, None: 0}
_JUDGES: tuple[Split, ...] = ("validation", "test")

Record = dict[str, Any]
"""``{"rows": how many, "of": learned rows looked at, "examples": [{"row": "train.jsonl:7", "stands_in":
"test.jsonl:3", "how": "exactly" | "nearly"}]}``; "said" are the words of it where they are others, "unknown" versions
of which nobody here knows what they learned from"""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """The row, by number, that judges and says the same."""

    judging: int
    how: Literal["exactly", "nearly"]


def leaks(alike: Alike, places: Sequence[Split | None]) -> dict[int, Leak]:
    """Rows whose prompt stands in a split that judges them: train rows (None: to be split yet) that are in validation
    or test, validation rows that are in test. `places` has each row's split."""
    judging: dict[int, int] = {}  # prompt -> the first row of the highest rank that has it
    for number, place in enumerate(places):
        if place in _JUDGES:
            held = judging.setdefault(alike.prompt[number], number)
            if _RANK[place] > _RANK[places[held]]:
                judging[alike.prompt[number]] = number
    telling = alike.telling() if judging else []
    found = {}
    for number, place in enumerate(places):
        prompt = alike.prompt[number]
        above = [
            (_RANK[places[judging[other]]], other == prompt, -judging[other])
            for other in (telling[prompt] if judging else ())
            if other in judging and _RANK[places[judging[other]]] > _RANK[place]
        ]
        if above:
            _, exactly, judge = max(above)
            found[number] = Leak(judging=-judge, how="exactly" if exactly else "nearly")
    return found


def record(found: Mapping[int, Leak], names: Sequence[str], of: int) -> Record:
    """What is kept of leaks with the data set; `names` says where each row stood."""
    examples = [
        {"row": names[number], "stands_in": names[leak.judging], "how": leak.how}
        for number, leak in sorted(found.items())[:_EXAMPLES]
    ]
    return {"rows": len(found), "of": of, "examples": examples}


def of_dataset(
    dataset: Dataset, parents: Sequence[Dataset] = (), asked: Mapping[str, Sequence[str]] | None = None,
    untold: Sequence[str] = (),
) -> Record:  # fmt: skip
    """What was found when a data set was made; of one that was made without looking, what is in it now. And which rows
    that judge the `parents` have taught, whose adapters training began from; and which rows of either are what suites
    ask of their own (`asked`: suite -> its texts). What of the versions it began from learned from data that is not
    here (`untold`) is told."""
    found = dict(dataset.contamination) if dataset.contamination is not None else _within(dataset)
    others = [parent for parent in parents if parent.digest != dataset.digest]
    if others:
        found = _sum(found, _between(others, dataset))
    if asked:
        taught = {row.id: (f"train.jsonl:{n} of the data set", row) for n, row in enumerate(dataset.rows("train"), 1)}
        found = _sum(found, _asked(_taught(others) | taught, asked) | {"of": 0})
    return found | ({"unknown": list(untold)} if untold else {})


def of_prompt(dataset: Dataset, system: str | None) -> Record:
    """Of a version that learned from nothing, which test rows its system prompt has, as an example say."""
    prompt, rows = normalise(system or ""), list(dataset.rows("test"))
    asked = [normalise(row.prompt[-1]["content"]) if row.prompt else "" for row in rows]
    found = [n for n, question in enumerate(asked) if len(question) >= _LEAST and question in prompt]
    examples = [{"row": f"test.jsonl:{n + 1}", "stands_in": "it", "how": "exactly"} for n in found[:_EXAMPLES]]
    return {"rows": len(found), "of": len(rows), "said": "test rows stand in the system prompt", "examples": examples}


def _sum(one: Record, other: Record) -> Record:
    return {
        "rows": one["rows"] + other["rows"],
        "of": one["of"] + other["of"],
        "examples": [*one["examples"], *other["examples"]][:_EXAMPLES],
    }


def _asked(taught: Mapping[str, tuple[str, Row]], asked: Mapping[str, Sequence[str]]) -> Record:
    """Rows whose question or answer is a text of a suite's own."""
    where = [(suite, text) for suite, texts in asked.items() for text in texts]
    names, rows = [name for name, _ in taught.values()], [row for _, row in taught.values()]
    others = [text for _, text in where]
    found = standing_in([row.answer for row in rows], others)
    found |= standing_in([row.prompt[-1]["content"] if row.prompt else "" for row in rows], others)
    examples = [
        {"row": names[n], "stands_in": f'the suite {where[other][0]} ("{_short(where[other][1])}")', "how": how}
        for n, (other, how) in sorted(found.items())[:_EXAMPLES]
    ]
    return {"rows": len(found), "of": len(rows), "examples": examples}


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else text[:_SHORT].rstrip() + "..."


def _taught(parents: Sequence[Dataset]) -> dict[str, tuple[str, Row]]:
    """Row id -> where it stands and the row, of all that the parents have taught."""
    taught: dict[str, tuple[str, Row]] = {}
    for parent in parents:
        for line, row in enumerate(parent.rows("train"), start=1):
            taught.setdefault(row.id, (f"train.jsonl:{line} of {parent.digest[:19]}, which it began from", row))
    return taught


def _between(parents: Sequence[Dataset], dataset: Dataset) -> Record:
    """Rows that any of the parents has taught, each once, and that judge now."""
    taught = _taught(parents)
    judging: list[tuple[Split, int, Row]] = [
        (split, line, row) for split in _JUDGES for line, row in enumerate(dataset.rows(split), start=1)
    ]
    names = [name for name, _ in taught.values()] + [f"{split}.jsonl:{line}" for split, line, _ in judging]
    places: list[Split | None] = [None] * len(taught)
    places += [split for split, _, _ in judging]
    rows = [*(row for _, row in taught.values()), *(row for _, _, row in judging)]
    found = {n: leak for n, leak in leaks(Alike(rows), places).items() if n < len(taught)}
    return record(found, names, len(taught))


def _within(dataset: Dataset) -> Record:
    rows: list[Row] = []
    names: list[str] = []
    places: list[Split] = []
    for split in reversed(SPLITS):
        for line, row in enumerate(dataset.rows(split), start=1):
            rows.append(row)
            names.append(f"{split}.jsonl:{line} of the data set")
            places.append(split)
    return record(leaks(Alike(rows), places), names, sum(place != "test" for place in places))
