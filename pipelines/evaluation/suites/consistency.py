"""Consistency: is the same asked in another way answered the same?

The last turn of test prompts is put in lower case, with a typing error, with other punctuation, and politely.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pipelines.data.split import position
from pipelines.evaluation import scores
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting, asking
from registry.datasets import Row

_ROWS = 24


def measure(setting: Setting) -> Finding:
    """Of each row the mean likeness of its variants' answers to its own answer: equality for labels, else chrF."""
    order = sorted(range(len(setting.cases)), key=lambda n: position(setting.cases[n].row.id, setting.seed + 2))
    asked = []  # number of the row, kind, case
    for number in order[:_ROWS]:
        for kind, row in variants(setting.cases[number].row, setting.seed).items():
            if (case := setting.case(row)) is not None:
                asked.append((number, kind, case))
    if not asked:
        return Finding(metrics={}, not_applicable={"consistency": "no test prompt can be varied"})
    answers = setting.ask([case for _, _, case in asked], "answers to variants")
    alike = likeness(scores.are_labels([case.row.answer for case in setting.cases]))
    rows = list(dict.fromkeys(number for number, _, _ in asked))
    measured: dict[str, list[float]] = {}
    kinds: dict[str, list[float]] = {}
    for who, given in answers.items():
        found: dict[int, list[float]] = {number: [] for number in rows}
        for (number, kind, _), answer in zip(asked, given, strict=True):
            value = alike(answer.text, setting.answers[who][number].text)
            found[number].append(value)
            if who == "candidate":
                kinds.setdefault(kind, []).append(value)
        measured[who] = [sum(found[number]) / len(found[number]) for number in rows]
    return Finding(
        metrics=means({"consistency": measured}),
        about={kind: {"variants": len(values), "consistency": sum(values) / len(values)}
               for kind, values in sorted(kinds.items())},
    )  # fmt: skip


def likeness(labels: bool) -> Callable[[str, str], float]:
    """How alike two answers are, from 0 to 1."""
    chrf = scores.Chrf()

    def alike(one: str, other: str) -> float:
        if labels or one.split() == other.split():
            return scores.label_match(one, other)
        return chrf(one, other)

    return alike


def variants(row: Row, seed: int) -> dict[str, Row]:
    """The row with its last question in other words, by kind; kinds that change nothing are left out."""
    text = row.prompt[-1]["content"]
    found = {
        "lower case": text.lower(),
        "typing error": _mistyped(text, random.Random(f"{seed} {row.id}")),
        "punctuation": text.rstrip(" .?!") + ("?" if text.rstrip().endswith(".") else " ."),
        "polite": f"Please: {text}",
    }
    return {kind: asking(row, changed) for kind, changed in found.items() if changed != text}


def _mistyped(text: str, draw: random.Random) -> str:
    """Two neighbouring letters inside a word exchanged; the text as it is where no word is long enough."""
    places = [
        n for n in range(1, len(text) - 2)
        if text[n - 1 : n + 3].isalpha() and text[n] != text[n + 1]
    ]  # fmt: skip
    if not places:
        return text
    at = draw.choice(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
