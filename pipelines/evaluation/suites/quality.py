"""Quality: the loss of the expected answers, and how near the given ones come to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.evaluation import labels, scores
from pipelines.evaluation.comparison import Measured, compare, means
from pipelines.evaluation.hosted import NOT_APPLICABLE
from pipelines.evaluation.suites import Finding, Setting
from registry.statistics import Estimate, resampled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Loss = tuple[float, int]
"""The loss of a row's expected answer in nats a token, and its tokens."""


def measure(setting: Setting) -> Finding:
    total = len(setting.cases)
    losses = setting.bench.losses(setting.cases, lambda done: setting.say("loss of the expected answers", done, total))
    measured: Measured = {"loss": dict(losses)}
    expected = [case.row.answer for case in setting.cases]
    texts = setting.texts
    are_labels = scores.are_labels(expected)
    for who, given in texts.items():
        found = scores.score([text or "" for text in given], expected, labels=are_labels, schema=setting.schema)
        for metric, values in found.items():
            told = [None if text is None else value for text, value in zip(given, values, strict=True)]
            measured.setdefault(metric, {})[who] = told
    lengths = [case.completion_length for case in setting.cases]
    metrics = means(measured)
    about: dict[str, Any] = {}
    not_applicable: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    if "candidate" in losses:
        metrics["perplexity"] = compare(
            {who: list(zip(values, lengths, strict=True)) for who, values in losses.items()},
            lambda rows: perplexity(rows),
            perplexity,
        )
    else:
        del measured["loss"]
        unavailable |= {metric: NOT_APPLICABLE[metric] for metric in ("loss", "perplexity")}
    if are_labels:
        metrics["macro_f1"] = labels.macro_f1(texts, expected, {row.answer for row in setting.training})
        about["labels"] = labels.by_label(texts, expected)
        about["labels_left_out"] = len(labels.frequent(expected, total)) - len(about["labels"])
    else:
        not_applicable |= dict.fromkeys(("label_accuracy", "macro_f1"), "the expected answers are no labels")
    if setting.schema is None:
        not_applicable["schema_valid"] = "the model has no JSON schema (evaluation.schema)"
    return Finding(metrics=metrics, rows=measured, not_applicable=not_applicable, unavailable=unavailable, about=about)


def perplexity(rows: Sequence[Loss], others: Sequence[Loss] | None = None) -> Estimate:
    """The exponential of the mean loss of all tokens; with others, how much it is above theirs."""
    import numpy as np

    def of(weights: NDArray[np.float64], side: Sequence[Loss]) -> NDArray[np.float64]:
        loss, tokens = np.array(side, dtype=float).T
        found: NDArray[np.float64] = np.exp(np.minimum(weights @ (loss * tokens) / (weights @ tokens), 700.0))[:, None]
        return found

    return resampled(
        lambda weights: of(weights, rows) - (of(weights, others) if others is not None else 0.0),
        len(rows),
        higher_is_better=False,
    )[0]
