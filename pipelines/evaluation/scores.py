"""What an answer is worth beside the expected one: numbers from 0 to 1, one a row, more is better."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from registry.datasets import normalise

LABEL_CHARACTERS = 64


def exact_match(answer: str, expected: str) -> float:
    """1 when the texts are equal but for white space."""
    return float(answer.split() == expected.split())


def label_match(answer: str, expected: str) -> float:
    """1 when the texts are equal but for case, punctuation and white space."""
    return float(normalise(answer) == normalise(expected))


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over the words of both (Rajpurkar et al. 2016, SQuAD), lower case."""
    given, wanted = _words(answer), _words(expected)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


class RougeL:
    """ROUGE-L F-measure (Lin 2004): the longest common subsequence of words. Words are the same as in `token_f1`,
    since rouge-score's own keep ASCII letters only, and would give 0 to every other script."""

    def __init__(self) -> None:
        from rouge_score import rouge_scorer

        class Words:
            def tokenize(self, text: str) -> list[str]:
                return _words(text)

        self._scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())

    def __call__(self, answer: str, expected: str) -> float:
        return float(self._scorer.score(expected, answer)["rougeL"].fmeasure)


class Chrf:
    """chrF (Popović 2015; sacrebleu's, character 6-grams, beta 2), divided by 100."""

    def __init__(self) -> None:
        from sacrebleu.metrics import CHRF

        self._chrf = CHRF()

    def __call__(self, answer: str, expected: str) -> float:
        return float(self._chrf.sentence_score(answer, [expected]).score) / 100


class SchemaValid:
    """1 when an answer is JSON, all of it, that a JSON Schema takes (draft 2020-12 unless it names another).
    References out of the schema are not followed. The expected answer does not count."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        from jsonschema import Draft202012Validator
        from jsonschema.validators import validator_for
        from referencing import Registry

        # With a registry of its own nothing is fetched from a network
        self._validator: Any = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())

    def __call__(self, answer: str, expected: str) -> float:
        try:
            return float(self._validator.is_valid(json.loads(answer, parse_constant=_no_json)))
        except (ValueError, RecursionError):
            return 0.0


def score(
    answers: Sequence[str], expected: Sequence[str], *, labels: bool, schema: Mapping[str, Any] | None = None
) -> dict[str, list[float]]:
    """Every metric of every row; ``label_accuracy`` only where the expected answers are labels, ``schema_valid`` only
    with a JSON schema."""
    scorers: dict[str, Callable[[str, str], float]] = {
        "exact_match": exact_match,
        "token_f1": token_f1,
        "rouge_l": RougeL(),
        "chrf": Chrf(),
    }
    if labels:
        scorers["label_accuracy"] = label_match
    if schema is not None:
        scorers["schema_valid"] = SchemaValid(schema)
    return {name: [scorer(a, e) for a, e in zip(answers, expected, strict=True)] for name, scorer in scorers.items()}


def are_labels(expected: Sequence[str]) -> bool:
    """Whether the expected answers are labels: short, few words, and most of them given to several rows.

    On a sample of 200 rows CLINC150's 150 intents repeat little, so labels may also be told by their shape: words
    joined by underscores or hyphens.
    """
    counts = Counter(expected)
    if len(counts) < 2 or any(len(e) > LABEL_CHARACTERS or len(e.split()) > 4 for e in counts):
        return False
    repeated = sum(n for n in counts.values() if n > 1) / counts.total()
    shaped = sum(n for e, n in counts.items() if re.fullmatch(r"\w+(-\w+)*", e)) / counts.total()
    return repeated >= 0.5 or shaped >= 0.95


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
