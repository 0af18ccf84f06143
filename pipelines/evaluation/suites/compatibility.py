"""Compatibility: what the champion answers well, is it still answered as well?

A version that is better on the whole and wrong where people had come to rely on its predecessor breaks what was built
on it (Srivastava et al. 2020, backward compatibility; the share of such rows is the negative flip rate of Yan et al.
2021, here counted the other way round).
"""

from __future__ import annotations

from pipelines.evaluation import scores
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting

_GOOD, _SLACK = 0.5, 0.05  # chrF from which a free text counts as good, and what it may lose


def measure(setting: Setting) -> Finding:
    if "champion" not in setting.answers:
        return Finding(metrics={}, not_applicable={"golden_kept": "no version serves"})
    expected = [case.row.answer for case in setting.cases]
    chrf = scores.Chrf()
    score = scores.label_match if scores.are_labels(expected) else chrf
    values = {
        who: [score(answer.text, e) for answer, e in zip(given, expected, strict=True)]
        for who, given in setting.answers.items()
    }
    golden = [n for n, value in enumerate(values["champion"]) if value >= _GOOD]
    if not golden:
        return Finding(metrics={}, not_applicable={"golden_kept": "the serving version answers no test row well"})
    kept = {who: [float(v[n] >= values["champion"][n] - _SLACK) for n in golden] for who, v in values.items()}
    lost = [n for n, well in zip(golden, kept["candidate"], strict=True) if not well]
    return Finding(
        metrics=means({"golden_kept": kept}),
        about={
            "golden": len(golden),
            "lost": [
                {
                    "prompt": setting.cases[n].row.prompt[-1]["content"],
                    "expected": expected[n],
                    "champion": setting.answers["champion"][n].text,
                    "candidate": setting.answers["candidate"][n].text,
                }
                for n in lost[:12]
            ],
        },
    )
