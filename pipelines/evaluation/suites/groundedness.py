"""Groundedness: does an answer keep to the context that its prompt gives?

Only where the expected answers themselves do; elsewhere there is nothing to measure. An answer is supported when nearly
all its content words, and all its numbers, stand in the prompt, and none of its clauses contradicts the clause of the
prompt that it shares most words with: by a negation that only one of them has, or by a number where that clause has
another. Questions of the prompt assert nothing, so no clause is held against them.

That is a stand-in for people's judgement, by words alone, in English, and its agreement with labelled examples that the
rules never saw stands beside the numbers. What it cannot see: swapped roles ("Paul lent Anna 40 euros" where Anna lent
Paul), a word put for its opposite or for another of the context, what follows by reasoning or arithmetic, and
negations without a word of their own ("refused to open").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.evaluation.agreement import agreement, doubted
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting

_SHARE = 0.75  # of an answer's content words that must stand in the context
_APPLIES = 0.8  # of the expected answers that must be supported
MADE_WITH = Path(__file__).with_name("grounded.jsonl")
HELD_OUT = Path(__file__).with_name("grounded_held_out.jsonl")
# English words that say nothing of what an answer claims
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can did do does for from had has have he her his i if in is it its may of on"
        " or our she so than that the their them then there these they this to was we were what when where which who"
        " will with would yes you your",
    )
)
_NEGATIONS = frozenset(("not", "no", "never", "none", "nobody", "nothing", "nowhere", "neither", "nor", "without"))
_NUMBERS = dict(
    zip(
        re.findall(
            r"\w+",  # without "one", which is mostly no number
            "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
            " eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand",
        ),
        map(str, (*range(2, 21), *range(30, 101, 10), 1000)),
        strict=True,
    )
)
_WORD = re.compile(r"\d+(?:[.,:]\d+)*\w*|\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_JOINT = re.compile(
    r"[,;:–]\s+|\s(?=(?:and|but|or|while|whereas|although|though|because|since|if|unless|when|which|who)\s)",
    re.IGNORECASE,
)
_CARRIED = 0.75  # of a word, for one that stands in the clause before alone
_LEAST = 3  # words that make a clause: "Windows and Linux" are none


@dataclass(frozen=True, kw_only=True)
class _Clause:
    """`before` are the words of the sentence's clause before it, which it may go without: "and at night by bus"."""

    words: frozenset[str]
    before: frozenset[str]
    numbers: frozenset[str]
    negated: bool


def measure(setting: Setting) -> Finding:
    contexts = ["\n".join(message["content"] for message in case.row.prompt) for case in setting.cases]
    expected = [supported(case.row.answer, context) for case, context in zip(setting.cases, contexts, strict=True)]
    if sum(expected) < _APPLIES * len(expected):
        why = "the expected answers do not come from their prompts"
        return Finding(metrics={}, not_applicable={"supported_answers": why})
    measured = {
        who: [float(bool(a.text.strip()) and supported(a.text, c)) for a, c in zip(given, contexts, strict=True)]
        for who, given in setting.answers.items()
    }
    scorer = told()
    return Finding(
        metrics=means({"supported_answers": measured}),
        about={"scorers": {"support": scorer}},
        doubted=doubted(scorer, ("supported_answers",), "the words by which support is told"),
    )


@cache
def told() -> Mapping[str, Any]:
    """How well `supported` agrees with the labels of answers that it never saw, as `agreement`."""
    return agreement(HELD_OUT, lambda line: supported(line["answer"], line["context"]), "supported")


def supported(answer: str, context: str) -> bool:
    """Whether an answer keeps to a context, by its words; an answer without content words does."""
    known = _clause(context)
    said = _clause(answer)
    if not said.numbers <= known.numbers:
        return False
    words = [word for word in _content(answer) if word not in said.numbers]
    if sum(word in known.words for word in words) < _SHARE * len(words):
        return False
    asserted = [sentence for sentence in _SENTENCE.split(context) if not sentence.rstrip().endswith("?")]
    there = [clause for sentence in asserted for clause in _clauses(sentence)]
    return not any(
        _contradicted(clause, there) for sentence in _SENTENCE.split(answer) for clause in _clauses(sentence)
    )


def _contradicted(clause: _Clause, context: Sequence[_Clause]) -> bool:
    """Whether the clauses of the context that have most of its words, or each of them, say otherwise."""
    closest = _closest(clause.words, context)
    if closest and all(other.negated != clause.negated for other in closest):
        return True
    for number in clause.numbers:
        closest = _closest(clause.words - {number}, context)
        if closest and all(other.numbers and number not in other.numbers for other in closest):
            return True
    return False


def _closest(words: frozenset[str], context: Sequence[_Clause]) -> list[_Clause]:
    """The clauses that share most of the words, those that they may go without counting less; none where no clause has
    any."""
    shared = [len(words & other.words) + _CARRIED * len(words & other.before) for other in context]
    most = max(shared, default=0.0)
    return [other for other, count in zip(context, shared, strict=True) if count == most] if most else []


def _clauses(sentence: str) -> list[_Clause]:
    """A sentence's parts between commas and joining words, the short ones with what stands before them."""
    parts: list[str] = []
    for part in _JOINT.split(sentence):
        if parts and min(len(_WORD.findall(part)), len(_WORD.findall(parts[-1]))) < _LEAST:
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    found: list[_Clause] = []
    for part in parts:
        clause = _clause(part, found[-1] if found else None)
        if clause.words:
            found.append(clause)
    return found


def _clause(text: str, last: _Clause | None = None) -> _Clause:
    words = frozenset(_content(text))
    return _Clause(
        words=words,
        before=last.words - last.numbers - words if last is not None else frozenset(),
        numbers=frozenset(word for word in words if word[0].isdigit()),
        negated=any(word in _NEGATIONS for word in _words(text)),
    )


def _content(text: str) -> list[str]:
    """The words that say what a text claims, without endings; numbers as digits."""
    words = [word for word in _words(text) if word not in _COMMON and word not in _NEGATIONS]
    return [_NUMBERS.get(word) or _stem(word) for word in words]


def _words(text: str) -> list[str]:
    apart = re.sub(r"\bcan't\b|\bcannot\b", "can not", text.casefold().replace("\u2019", "'"))
    apart = re.sub(r"\bwon't\b", "will not", apart)
    return _WORD.findall(re.sub(r"n't\b", " not", apart))


def _stem(word: str) -> str:
    """A word without the endings of English plurals and verbs, roughly."""
    return re.sub(r"(?:ing|ed|es|s)$", "", word) if len(word) > 4 and not word[0].isdigit() else word
