"""Quality: the loss of the expected answers, and how near the given ones come to them."""

from __future__ import annotations

from pipelines.evaluation import scores
from pipelines.evaluation.comparison import Measured, means
from pipelines.evaluation.suites import Finding, Setting


def measure(setting: Setting) -> Finding:
    total = len(setting.cases)
    losses = setting.bench.losses(setting.cases, lambda done: setting.say("loss of the expected answers", done, total))
    measured: Measured = {"loss": dict(losses)}
    expected = [case.row.answer for case in setting.cases]
    labels = scores.are_labels(expected)
    for who, texts in setting.texts.items():
        for metric, values in scores.score([text or "" for text in texts], expected, labels=labels).items():
            told = [None if text is None else value for text, value in zip(texts, values, strict=True)]
            measured.setdefault(metric, {})[who] = told
    return Finding(metrics=means(measured), rows=measured)
