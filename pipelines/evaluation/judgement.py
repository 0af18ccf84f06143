"""The judgement: candidate, base and champion on the same untouched rows, every difference paired.

`evaluate` gives the evaluation that gates decide on and that is kept as evidence::

    {"metrics": {name: {"candidate": estimate, "base": estimate, "champion": estimate | null,
                        "vs_base": estimate, "vs_champion": estimate | null}},
     "not_applicable": {name: "why there is nothing to measure"},
     "unavailable": {name: "why it could not be measured"},
     "slices": {"source=train": {the same as metrics}, "label=refund": {the same}, ...},
     "rows": 200, "suites": ["quality", "latency"], "about": {suite: what else it has to say},
     "examples": [{"messages", "expected", "candidate", "base", "champion"}]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infra.errors import UsageError
from pipelines.config_scorers import Toxicity
from pipelines.data.split import position
from pipelines.evaluation import scores, slices, suites
from pipelines.evaluation.suites import Progress, Setting
from registry.bases import Base
from registry.datasets import Row
from registry.profile import Answer

if TYPE_CHECKING:
    from deploy.decoding import Result
    from pipelines.evaluation.answers import Case

EXAMPLES = 12


class Lengths(Protocol):
    """What is needed of a version's generation defaults."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluation` is the evidence, as JSON. `rows`, and the candidate's `answers` to them with the number of prompt
    tokens each, are what its profile is made of."""

    evaluation: dict[str, Any]
    rows: list[Row]
    answers: list[Answer]
    prompt_tokens: list[int]


def evaluate(
    *,
    base: Base,
    candidate: Path | None,
    champion: Path | None,
    rows: Sequence[Row],
    training: Sequence[Row] = (),
    system: str | None,
    generation: Lengths,
    names: Sequence[str],
    limit: int = 200,
    seed: int = 0,
    schema: Mapping[str, Any] | None = None,
    toxicity: Toxicity | None = None,
    wanted: Sequence[str | None] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Judge an adapter (None: the base with its prompt) by the suites of these `names`, on at most `limit` of the rows;
    `training` are those that it learned from, and `wanted` slices that must not be left out.

    Raises UsageError when there is no row, or none that fits the base's context.
    """
    from pipelines.evaluation.answers import Bench

    say = progress or (lambda *_: None)
    say("loading the base")
    versions = {"candidate": candidate, "base": None} | ({"champion": champion} if champion is not None else {})
    bench = Bench(base, versions)
    sample = choose(rows, limit, seed)
    cases = bench.cases(sample, system=system, max_tokens=generation.max_tokens)
    if not cases:
        raise UsageError(
            f"None of the {len(rows)} test rows fits the base's context.", hint="Shorten them, or take another base."
        )
    setting = Setting(
        bench=bench, cases=cases, training=training, system=system, max_tokens=generation.max_tokens, seed=seed,
        say=say, temperature=generation.temperature, schema=schema, toxicity=toxicity,
    )  # fmt: skip
    found = {name: suites.measure(name, setting) for name in names}
    say("done", 1, 1)
    answers = setting.answers
    return Evaluation(
        evaluation={
            "metrics": {metric: values for f in found.values() for metric, values in f.metrics.items()},
            "unavailable": {metric: why for f in found.values() for metric, why in f.unavailable.items()},
            "not_applicable": {metric: why for f in found.values() for metric, why in f.not_applicable.items()},
            "slices": slices.measure(
                [case.row for case in cases],
                {metric: values for f in found.values() for metric, values in f.rows.items()},
                {metric: values for f in found.values() for metric, values in f.metrics.items()},
                wanted,
            ),
            "rows": len(cases),
            "rows_left_out": len(sample) - len(cases),
            "suites": list(names),
            "about": {name: f.about for name, f in found.items() if f.about},
            "examples": _examples(cases, answers),
        },
        rows=[case.row for case in cases],
        answers=[
            Answer(
                text=result.text,
                completion_tokens=len(result.tokens),
                finish_reason=result.finish_reason,
                mean_logprob=result.mean_logprob,
            )
            for result in answers["candidate"]
        ],
        prompt_tokens=[len(case.prompt) for case in cases],
    )


def choose(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """At most `limit` rows, the same ones for ever: each source gets an equal share, as far as it has rows, so that
    a small slice is not lost in a large one; within a source by a hash of the row."""
    waiting: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: position(row.id, seed)):
        waiting.setdefault(row.source, []).append(row)
    left = limit
    chosen: set[str] = set()
    for number, source in enumerate(sorted(waiting, key=lambda s: (len(waiting[s]), s))):
        share = left // (len(waiting) - number)  # the smallest first: what they leave is the others'
        taken = waiting[source][:share]
        chosen.update(row.id for row in taken)
        left -= len(taken)
    kept: dict[str, Row] = {}
    for row in rows:
        if row.id in chosen:
            kept.setdefault(row.id, row)
    return list(kept.values())


def _examples(cases: Sequence[Case], answers: dict[str, list[Result]]) -> list[dict[str, Any]]:
    """The candidate's worst answers first, by chrF, and of equals the least sure one."""
    chrf = scores.Chrf()
    given = answers["candidate"]
    order = sorted(range(len(cases)), key=lambda n: (chrf(given[n].text, cases[n].row.answer), given[n].mean_logprob))
    return [
        {
            "messages": list(cases[n].row.prompt),
            "expected": cases[n].row.answer,
            "candidate": answers["candidate"][n].text,
            "base": answers["base"][n].text,
            "champion": answers["champion"][n].text if "champion" in answers else None,
        }
        for n in order[:EXAMPLES]
    ]
