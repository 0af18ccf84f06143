"""Language cost: how many tokens does a text take, by language?

Tokens are paid for in time, context and money, and most tokenisers need more of them for the same text in other
languages than English (Petrov et al. 2023, Language Model Tokenizers Introduce Unfairness Between Languages). Counted
are the tokens of the texts alone, without a template's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.evaluation.catalogue import SUITES
from pipelines.evaluation.comparison import Measured, means
from pipelines.evaluation.suites import Finding, Setting
from registry import languages
from registry.statistics import mean_ci

_MOST = 8  # languages in the table, the most frequent


def measure(setting: Setting) -> Finding:
    """An empty answer has no number, nor a word in a language without spaces; the table is of the candidate."""
    # A hosted model counts by a tokeniser of its own, which is not known here
    here = setting.bench.here
    if "candidate" not in here:
        why = "the tokeniser of a hosted model is not known"
        return Finding(metrics={}, unavailable=dict.fromkeys(SUITES["language_cost"], why))
    answers = {who: [answer.text for answer in given] for who, given in setting.answers.items() if who in here}
    questions = [case.row.prompt[-1]["content"] for case in setting.cases]
    tokens = _tokens(setting, "candidate")
    per = {"answer_tokens_per_character": _per_character, "answer_tokens_per_word": _per_word}
    counted = {who: list(map(_tokens(setting, who), given)) for who, given in answers.items()}
    measured: Measured = {
        metric: {
            who: [each(text, n) for text, n in zip(given, counted[who], strict=True)] for who, given in answers.items()
        }
        for metric, each in per.items()
    }
    metrics = means(measured)
    not_applicable = dict.fromkeys(per.keys() - metrics.keys(), "the version answers no test row with words")
    told = [languages.guess(text) for text in questions]
    table = []
    for language, rows in Counter(told).most_common(_MOST):
        line: dict[str, Any] = {"language": language, "rows": rows}
        for what, texts in (("questions", questions), ("answers", answers["candidate"])):
            chosen = [text for text, other in zip(texts, told, strict=True) if other == language]
            line[f"{what}_per_character"] = _mean([_per_character(text, tokens(text)) for text in chosen])
            line[f"{what}_per_word"] = _mean([_per_word(text, tokens(text)) for text in chosen])
        table.append(line)
    return Finding(
        metrics=metrics,
        rows={metric: measured[metric] for metric in metrics},
        not_applicable=not_applicable,
        about={"languages": table},
    )


def _tokens(setting: Setting, version: str) -> Callable[[str], int]:
    """Counts by the tokeniser of a version's base."""
    tokenizer = setting.bench.of(version).tokenizer
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _per_character(text: str, tokens: int) -> float | None:
    """None of an empty text; white space around it does not count."""
    return tokens / len(text.strip()) if text.strip() else None


def _per_word(text: str, tokens: int) -> float | None:
    """None of a text without words, or in a language that writes them without spaces."""
    words = len(re.findall(r"\w+", text))
    return tokens / words if words and languages.guess(text) not in languages.UNSPACED else None


def _mean(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    return mean_ci(known, higher_is_better=False).to_json() if known else None
