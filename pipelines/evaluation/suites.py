"""The judgement: candidate, base and champion on the same untouched rows, every difference paired.

`evaluate` gives the evaluation that gates decide on and that is kept as evidence::

    {"metrics": {name: {"candidate": estimate, "base": estimate, "champion": estimate | null,
                        "vs_base": estimate, "vs_champion": estimate | null}},
     "slices": {"source=train": {the same}, "source=feedback": {the same}},
     "rows": 200, "suites": ["quality", "latency"],
     "examples": [{"messages", "expected", "candidate", "base", "champion"}]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infra.errors import UsageError
from pipelines.data.split import position
from pipelines.evaluation import metrics
from registry.bases import Base
from registry.datasets import Row
from registry.profile import Answer
from registry.statistics import Estimate, mean_ci, paired_difference, percentile_ci, percentile_difference

if TYPE_CHECKING:
    from deploy.decoding import Result
    from pipelines.evaluation.answers import Bench, Case

LOWER_IS_BETTER = frozenset({"loss", "p95_latency_ms"})
EXAMPLES = 12
LATENCY_ROWS, LATENCY_SECONDS, LATENCY_LEAST = 24, 30.0, 6

Progress = Callable[..., None]
Measured = dict[str, dict[str, list[float]]]
"""metric -> version -> one number a row"""


class Lengths(Protocol):
    """What is needed of a version's generation defaults."""

    @property
    def max_tokens(self) -> int: ...


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
    system: str | None,
    generation: Lengths,
    suites: Sequence[str],
    limit: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge an adapter (None: the base with its prompt) on at most `limit` of the rows.

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
    measured, results = _quality(bench, cases, generation.max_tokens, say)
    found = _estimates(measured, range(len(cases)))
    slices = {}
    for source in dict.fromkeys(case.row.source for case in cases):
        chosen = [n for n, case in enumerate(cases) if case.row.source == source]
        slices[f"source={source}"] = _estimates(measured, chosen)
    if "latency" in suites:
        found.update(_latency(bench, cases, generation.max_tokens, seed, say))
    say("done", 1, 1)
    return Evaluation(
        evaluation={
            "metrics": found,
            "slices": slices,
            "rows": len(cases),
            "rows_left_out": len(sample) - len(cases),
            "suites": list(suites),
            "examples": _examples(cases, measured, results),
        },
        rows=[case.row for case in cases],
        answers=[
            Answer(
                text=result.text,
                completion_tokens=len(result.tokens),
                finish_reason=result.finish_reason,
                mean_logprob=result.mean_logprob,
            )
            for result in results["candidate"]
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


def _quality(
    bench: Bench, cases: Sequence[Case], max_tokens: int, say: Progress
) -> tuple[Measured, dict[str, list[Result]]]:
    total = len(cases)
    losses = bench.losses(cases, lambda done: say("loss of the expected answers", done, total))
    # The untuned base seldom ends by itself; twice the longest expected answer is enough to judge it by. Versions
    # that are to serve are given what they would be given in serving.
    longest = max(case.completion_length for case in cases)
    most = dict.fromkeys(bench.versions, max_tokens)
    if bench.versions["candidate"] is not None:
        most["base"] = min(max_tokens, 2 * longest + 8)
    asked = total * len(bench.versions)
    results = bench.answers(cases, max_tokens=most, progress=lambda done: say("answers", done, asked))
    expected = [case.row.answer for case in cases]
    labels = metrics.are_labels(expected)
    measured: Measured = {"loss": losses}
    for name, answers in results.items():
        for metric, values in metrics.score([r.text for r in answers], expected, labels=labels).items():
            measured.setdefault(metric, {})[name] = values
    return measured, results


def _latency(
    bench: Bench, cases: Sequence[Case], max_tokens: int, seed: int, say: Progress
) -> dict[str, dict[str, Any]]:
    """Requests one at a time. Tokens a second are those of a row's answer over its time."""
    say("latency")
    chosen = sorted(cases, key=lambda case: position(case.row.id, seed + 1))[:LATENCY_ROWS]
    bench.alone(chosen[:1], max_tokens=4, seconds=0, least=1)  # what the first request pays is nobody's latency
    results = bench.alone(chosen, max_tokens=max_tokens, seconds=LATENCY_SECONDS, least=LATENCY_LEAST)
    milliseconds = {name: [1000 * r.seconds for r in answers] for name, answers in results.items()}
    rates = {name: [len(r.tokens) / max(r.seconds, 1e-9) for r in answers] for name, answers in results.items()}

    def p95(values: Sequence[float]) -> Estimate:
        return percentile_ci(values, 0.95, higher_is_better=False)

    def difference(one: Sequence[float], other: Sequence[float]) -> Estimate:
        return percentile_difference(one, other, 0.95, higher_is_better=False)

    count = range(len(rates["candidate"]))
    return {
        "p95_latency_ms": _compare(milliseconds, p95, difference),
        **_estimates({"tokens_per_second": rates}, count),
    }


def _estimates(measured: Measured, chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
    found = {}
    for metric, versions in measured.items():
        better = metric not in LOWER_IS_BETTER

        def mean(values: Sequence[float], better: bool = better) -> Estimate:
            return mean_ci(values, higher_is_better=better)

        def difference(one: Sequence[float], other: Sequence[float], better: bool = better) -> Estimate:
            return paired_difference(one, other, higher_is_better=better)

        values = {name: [numbers[n] for n in chosen] for name, numbers in versions.items()}
        found[metric] = _compare(values, mean, difference)
    return found


def _compare(
    values: Mapping[str, Sequence[float]],
    estimate: Callable[[Sequence[float]], Estimate],
    difference: Callable[[Sequence[float], Sequence[float]], Estimate],
) -> dict[str, Any]:
    champion = values.get("champion")
    return {
        "candidate": estimate(values["candidate"]).to_json(),
        "base": estimate(values["base"]).to_json(),
        "champion": estimate(champion).to_json() if champion is not None else None,
        "vs_base": difference(values["candidate"], values["base"]).to_json(),
        "vs_champion": difference(values["candidate"], champion).to_json() if champion is not None else None,
    }


def _examples(
    cases: Sequence[Case], measured: Measured, results: Mapping[str, Sequence[Result]]
) -> list[dict[str, Any]]:
    """The candidate's worst answers first: lowest chrF, and of equals the highest loss."""
    order = sorted(
        range(len(cases)), key=lambda n: (measured["chrf"]["candidate"][n], -measured["loss"]["candidate"][n])
    )
    return [
        {
            "messages": list(cases[n].row.prompt),
            "expected": cases[n].row.answer,
            "candidate": results["candidate"][n].text,
            "base": results["base"][n].text,
            "champion": results["champion"][n].text if "champion" in results else None,
        }
        for n in order[:EXAMPLES]
    ]
