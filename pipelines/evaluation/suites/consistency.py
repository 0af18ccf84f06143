"""Consistency: is the same asked in another way, or once more, answered the same?

The last turn of test prompts is put in other casing, with a typing error, with other punctuation, and in other words;
all of it by rule, so that nobody has to trust a model with the meaning. And the very same question is asked many times,
sampled: a version that is sure of its answers gives the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.data.split import position
from pipelines.evaluation import scores
from pipelines.evaluation.comparison import Measured, means
from pipelines.evaluation.suites import Finding, Setting, asking
from registry.datasets import Row
from registry.statistics import mean_ci

HOW = {
    "lower case": "all letters small",
    "capitals": "all letters capital",
    "typing error": "two neighbouring letters of a word exchanged",
    "punctuation": "another mark at the end",
    "polite": "Please: ... before it",
    "announced": "I have a question. ... before it, and Thank you! after it",
    "asked to be told": "Can you tell me this? ... before it",
}
_ROWS, _TIMES = 24, 5
_TEMPERATURE = 0.3  # for versions that are served greedily, and so would never answer differently


def measure(setting: Setting) -> Finding:
    """Of each row the mean likeness of its variants' answers to its own answer: equality for labels, else chrF."""
    order = sorted(range(len(setting.cases)), key=lambda n: position(setting.cases[n].row.id, setting.seed + 2))
    alike = likeness(scores.are_labels([case.row.answer for case in setting.cases]))
    temperature = setting.temperature or _TEMPERATURE
    measured: Measured = {"repeated_consistency": dict(_repeated(setting, order[:_ROWS], alike, temperature))}
    notes = [
        "Questions asked in another way are made by rule, not by a model, so that they mean the same.",
        f"The very same question was asked {_TIMES} times, sampled at temperature {temperature:g}.",
    ]
    asked = []  # number of the row, kind, case
    for number in order[:_ROWS]:
        for kind, row in variants(setting.cases[number].row, setting.seed).items():
            if (case := setting.case(row)) is not None:
                asked.append((number, kind, case))
    if not asked:
        why = {"consistency": "no test prompt can be varied"}
        return Finding(metrics=means(measured), not_applicable=why, about={"notes": notes[1:]})
    answers = setting.ask([case for _, _, case in asked], "answers to variants", base_most=setting.base_most)
    rows = list(dict.fromkeys(number for number, _, _ in asked))
    kinds: dict[str, list[float]] = {}
    measured["consistency"] = {}
    for who, given in answers.items():
        found: dict[int, list[float]] = {number: [] for number in rows}
        for (number, kind, _), answer in zip(asked, given, strict=True):
            value = alike(answer.text, setting.answers[who][number].text)
            found[number].append(value)
            if who == "candidate":
                kinds.setdefault(kind, []).append(value)
        measured["consistency"][who] = [sum(found[number]) / len(found[number]) for number in rows]
    lines: list[dict[str, Any]] = [
        {
            "kind": kind,
            "how": HOW[kind],
            "variants": len(kinds[kind]),
            "likeness": mean_ci(kinds[kind], higher_is_better=True).to_json(),
        }
        for kind in HOW
        if kind in kinds
    ]
    return Finding(metrics=means(measured), about={"variants": lines, "notes": notes})


def _repeated(
    setting: Setting, numbers: Sequence[int], alike: Callable[[str, str], float], temperature: float
) -> dict[str, list[float]]:
    """Of each row the mean likeness of several sampled answers to the greedy one."""
    cases = [setting.cases[number] for number in numbers for _ in range(_TIMES)]
    answers = setting.ask(cases, "the same questions again", temperature=temperature, base_most=setting.base_most)
    return {
        who: [
            sum(alike(again.text, setting.answers[who][number].text) for again in given[start : start + _TIMES])
            / _TIMES
            for number, start in zip(numbers, range(0, len(given), _TIMES), strict=True)
        ]
        for who, given in answers.items()
    }


def likeness(labels: bool) -> Callable[[str, str], float]:
    """How alike two answers are, from 0 to 1; no answer is like none."""
    chrf = scores.Chrf()

    def alike(one: str, other: str) -> float:
        if not one.strip() or not other.strip():
            return 0.0
        if labels or one.split() == other.split():
            return scores.label_match(one, other)
        return chrf(one, other)

    return alike


def variants(row: Row, seed: int) -> dict[str, Row]:
    """The row with its last question in other words, by kind; kinds that change nothing are left out."""
    text = row.prompt[-1]["content"]
    found = {
        "lower case": text.lower(),
        "capitals": text.upper(),
        "typing error": _mistyped(text, random.Random(f"{seed} {row.id}")),
        "punctuation": text.rstrip(" .?!") + ("?" if text.rstrip().endswith(".") else " ."),
        "polite": f"Please: {text}",
        "announced": f"I have a question. {text} Thank you!",
        "asked to be told": f"Can you tell me this? {text}",
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
