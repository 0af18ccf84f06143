"""Compatibility: what the champion answers well, is it still answered as well?

A version that is better on the whole and wrong where people had come to rely on its predecessor breaks what was built
on it (Srivastava et al. 2020, backward compatibility; the share of such rows is the negative flip rate of Yan et al.
2021, here counted the other way round).

Asked are the champion's golden rows, the test rows of its own data set that it was judged by: those of the candidate
may be of another file, and say nothing of what people rely on. Rows that the candidate has learned from, exactly or
nearly, are left out, and how many is said. Where the champion's data set is not in this store, the candidate's test
rows are asked instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.evaluation import scores
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting
from registry.datasets import Row

if TYPE_CHECKING:
    from pipelines.evaluation.answers import Case

_GOOD, _SLACK = 0.5, 0.05  # chrF from which a free text counts as good, and what it may lose


def measure(setting: Setting) -> Finding:
    if "champion" not in setting.answers:
        return Finding(metrics={}, not_applicable={"golden_kept": "no version serves"})
    cases, notes = _asked(setting)
    if not cases:
        return Finding(metrics={}, unavailable={"golden_kept": "of the serving version's test rows none can be asked"})
    answers = setting.ask_all(cases, "answers to the serving version's test rows")
    expected = [case.row.answer for case in cases]
    chrf = scores.Chrf()
    score = scores.label_match if scores.are_labels(expected) else chrf
    values = {
        who: [score(answer.text, e) for answer, e in zip(given, expected, strict=True)]
        for who, given in answers.items()
    }
    golden = [n for n, value in enumerate(values["champion"]) if value >= _GOOD]
    if not golden:
        return Finding(
            metrics={},
            not_applicable={"golden_kept": "the serving version answers no test row well"},
            about={"notes": notes},
        )
    kept = {who: [float(v[n] >= values["champion"][n] - _SLACK) for n in golden] for who, v in values.items()}
    lost = [n for n, well in zip(golden, kept["candidate"], strict=True) if not well]
    return Finding(
        metrics=means({"golden_kept": kept}),
        about={
            "golden": len(golden),
            "asked": len(cases),
            "lost": [
                {
                    "prompt": cases[n].row.prompt[-1]["content"],
                    "expected": expected[n],
                    "champion": answers["champion"][n].text,
                    "candidate": answers["candidate"][n].text,
                }
                for n in lost[:12]
            ],
            "notes": notes,
        },
    )


def _asked(setting: Setting) -> tuple[Sequence[Case], list[str]]:
    """What is asked, and what there is to say of it."""
    if setting.golden is None:
        return setting.cases, [
            "Golden answers are those to the new version's test rows: the serving version's are not in this store."
        ]
    apart = _unlearned(setting)
    cases = [case for row in apart if (case := setting.case(row)) is not None]
    notes = []
    if learned := len(setting.golden) - len(apart):
        notes.append(
            f"{learned} of the {len(setting.golden)} golden rows of the serving version are left out, since the new "
            "version has learned from them, or from nearly the same."
        )
    if long := len(apart) - len(cases):
        notes.append(f"{long} golden rows of the serving version do not fit a base's context and are left out.")
    return cases, notes


def _unlearned(setting: Setting) -> list[Row]:
    """The golden rows whose prompts are not nearly those of rows that the candidate learned from."""
    from pipelines.data.dedup import Alike

    golden = list(setting.golden or ())
    if not setting.training:
        return golden
    alike = Alike([*golden, *setting.training])
    taught, telling = set(alike.prompt[len(golden) :]), alike.telling()
    return [row for row, prompt in zip(golden, alike.prompt, strict=False) if not telling[prompt] & taught]
