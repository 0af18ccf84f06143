"""Groundedness: does an answer keep to the context that its prompt gives?

Only where the expected answers themselves do; elsewhere there is nothing to measure. An answer is supported when nearly
all its content words, and all its numbers, stand in the prompt. That is a stand-in for people's judgement, so its
agreement with labelled examples stands beside the numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.evaluation.agreement import agreement
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting

_SHARE = 0.75  # of an answer's content words that must stand in the context
_APPLIES = 0.8  # of the expected answers that must be supported
LABELLED = Path(__file__).with_name("grounded.jsonl")
# English words that say nothing of what an answer claims
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can did do does for from had has have he her his i if in is it its may not"
        " of on or our she so than that the their them then there these they this to was we were what when where which"
        " who will with would you your",
    )
)


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
    scorer = agreement(LABELLED, lambda line: supported(line["answer"], line["context"]), "supported")
    return Finding(metrics=means({"supported_answers": measured}), about={"scorers": {"support": scorer}})


def supported(answer: str, context: str) -> bool:
    """Whether an answer keeps to a context, by its words; an answer without content words does."""
    known = {_stem(word) for word in re.findall(r"\w+", context.casefold())}
    words = [word for word in re.findall(r"\w+", answer.casefold()) if word not in _COMMON]
    if any(word not in known for word in words if any(c.isdigit() for c in word)):
        return False
    return sum(_stem(word) in known for word in words) >= _SHARE * len(words)


def _stem(word: str) -> str:
    """A word without the endings of English plurals and verbs, roughly."""
    return re.sub(r"(?:ing|ed|es|s)$", "", word) if len(word) > 4 else word
