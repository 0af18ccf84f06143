"""The judgement: candidate, base and champion on the same untouched rows, every difference paired.

`evaluate` gives the evaluation that gates decide on and that is kept as evidence::

    {"metrics": {name: {"candidate": estimate, "base": estimate, "champion": estimate | null,
                        "vs_base": estimate, "vs_champion": estimate | null,
                        and where a hosted model is named "hosted" and "vs_hosted": estimate | null}},
     "not_applicable": {name: "why there is nothing to measure"},
     "unavailable": {name: "why it could not be measured"},
     "doubted": {name: "why no gate may pass by it"},
     "slices": {"source=train": {the same as metrics}, "label=refund": {the same}, ...},
     "rows": 200, "suites": ["quality", "latency"], "about": {suite: what else it has to say},
     "examples": [{"messages", "expected", "candidate", "base", "champion"}],
     "answers": {row's id: the candidate's answer}}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infra.errors import Unreachable, UsageError
from pipelines import config_address
from pipelines.config_scorers import Benchmarks, Toxicity
from pipelines.data.split import position
from pipelines.evaluation import hosted as hosted_models
from pipelines.evaluation import scores, slices, suites
from pipelines.evaluation.catalogue import SUITES
from pipelines.evaluation.suites import Progress, Setting
from registry.bases import Base
from registry.datasets import Row
from registry.pricing import MachinePrice, TokenPrice
from registry.profile import Answer

if TYPE_CHECKING:
    from deploy.decoding import Result
    from pipelines.evaluation.answers import Case, Elsewhere

EXAMPLES = 12


class Lengths(Protocol):
    """What is needed of a version's generation defaults."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The champion with its own system prompt; `adapter` is None for a prompt on the base, the address of a hosted
    model, with its price, or a version on another base."""

    adapter: Path | config_address.Address | Elsewhere | None
    system: str | None
    price: TokenPrice | None = None


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
    candidate: Path | config_address.Address | None,
    champion: Path | Serving | None,
    rows: Sequence[Row],
    training: Sequence[Row] = (),
    golden: Sequence[Row] | None = None,
    system: str | None,
    generation: Lengths,
    names: Sequence[str],
    limit: int = 200,
    seed: int = 0,
    schema: Mapping[str, Any] | None = None,
    toxicity: Toxicity | None = None,
    benchmarks: Benchmarks | None = None,
    judge: config_address.Judge | None = None,
    hosted: config_address.Hosted | None = None,
    price: TokenPrice | None = None,
    machine: MachinePrice | None = None,
    wanted: Sequence[str | None] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Judge an adapter, the base with a prompt (None) or a hosted model, by the suites of these `names`, on at most
    `limit` of the rows; `training` are those that it learned from, `golden` the test rows that the champion was judged
    by, where they are known. The base is asked with the same system prompt, so
    that the difference is the adapter's or the model's; beside a prompt on it without one, so that it is the prompt's.
    A champion that is a path has the same prompt. `machine` is the price of the machine that would serve, `price` that
    of a hosted candidate's tokens, and `wanted` slices are not left out.

    Raises UsageError when there is no row, or none that fits the base's context, Unreachable when a hosted candidate or
    champion does not answer.
    """
    from pipelines.evaluation.answers import Bench, Version

    say = progress or (lambda *_: None)
    say("loading the base")
    beside = Serving(adapter=champion, system=system) if isinstance(champion, Path) else champion
    versions: dict[str, Version] = {"candidate": candidate, "base": None}
    if beside is not None:
        versions["champion"] = beside.adapter
    bench = Bench(base, versions)
    apart = apart_from_each_other(rows, seed)
    sample = choose(apart, limit, seed)
    systems = _systems(system, prompt_alone=candidate is None, beside=beside)
    cases = bench.cases(sample, system=system, max_tokens=generation.max_tokens, own=systems)
    if not cases:
        raise UsageError(
            f"None of the {len(rows)} test rows fits the base's context.", hint="Shorten them, or take another base."
        )
    setting = Setting(
        bench=bench,
        cases=cases,
        training=training,
        golden=choose(golden, limit, seed) if golden is not None and beside is not None else None,
        system=system,
        systems=systems,
        max_tokens=generation.max_tokens,
        temperature=generation.temperature,
        seed=seed,
        say=say,
        schema=schema,
        toxicity=toxicity,
        benchmarks=benchmarks,
        judge=judge,
        hosted_config=hosted if hosted_models.SUITES & set(names) else None,
        prices={"candidate": price, "champion": beside.price if beside is not None else None},
        machine=machine or MachinePrice(per_machine_hour_usd=0.0),
    )
    with closing(bench):
        found = {name: _measure(name, setting) for name in names}
        answers = setting.answers
        lost = {who: client.in_words(f"the {who}") for who, client in bench.hosted.items()}
    say("done", 1, 1)
    about = {name: f.about for name, f in found.items() if f.about}
    if setting.hosted is not None:
        about["hosted"] = dict(setting.hosted.about)
    if alike := len(rows) - len(apart):
        about["rows"] = {
            "notes": [
                f"{alike} of {len(rows)} test rows ask nearly the same as another and are left out: their answers are "
                "no evidence of their own, and intervals would be too narrow."
            ]
        }
    if bench.elsewhere:
        about["champion"] = {
            "notes": [
                "The champion stands on another base, whose tokens are other ones: loss, perplexity and tokens a "
                "second are not compared with it."
            ]
        }
    if notes := [note for each in lost.values() for note in each]:
        about["requests"] = {"notes": [*notes, "What has no answer counts as an empty one, as it would in serving."]}
    return Evaluation(
        evaluation={
            "metrics": {metric: values for f in found.values() for metric, values in f.metrics.items()},
            "not_applicable": {metric: why for f in found.values() for metric, why in f.not_applicable.items()},
            "unavailable": {metric: why for f in found.values() for metric, why in f.unavailable.items()},
            "doubted": {metric: why for f in found.values() for metric, why in f.doubted.items()},
            "slices": slices.measure(
                [case.row for case in cases],
                {metric: values for f in found.values() for metric, values in f.rows.items()},
                {metric: values for f in found.values() for metric, values in f.metrics.items()},
                wanted,
            ),
            "rows": len(cases),
            "rows_left_out": len(sample) - len(cases),
            "suites": list(names),
            "about": about,
            "examples": _examples(setting),
            "answers": {case.row.id: answer.text for case, answer in zip(cases, answers["candidate"], strict=True)},
        },
        **_for_profile(cases, answers["candidate"]),
    )


def _for_profile(cases: Sequence[Case], given: Sequence[Result]) -> dict[str, Any]:
    """The rows that the candidate answered, its answers, and their prompts' tokens: as a hosted model counts them
    itself, since live traffic is held against them."""
    from pipelines.evaluation.answers import HostedResult

    rows, answers, tokens = [], [], []
    for case, result in zip(cases, given, strict=True):
        hosted = isinstance(result, HostedResult)
        if hosted and result.finish_reason == "error":
            continue
        rows.append(case.row)
        tokens.append((result.prompt_tokens or 0) if isinstance(result, HostedResult) else len(case.prompt))
        completion = (result.completion_tokens or 0) if isinstance(result, HostedResult) else len(result.tokens)
        answers.append(
            Answer(
                text=result.text,
                completion_tokens=completion,
                finish_reason=result.finish_reason,
                mean_logprob=None if hosted else result.mean_logprob,
            )
        )
    return {"rows": rows, "answers": answers, "prompt_tokens": tokens}


def _measure(name: str, setting: Setting) -> suites.Finding:
    """What a suite finds. An address that answers the test rows and refuses what another suite asks, such as harmful
    questions, costs that suite and not the judgement."""
    try:
        return suites.measure(name, setting)
    except Unreachable as error:
        if name in hosted_models.SUITES:
            raise
        return suites.Finding(metrics={}, unavailable=dict.fromkeys(SUITES[name], error.message.rstrip(".")))


def apart_from_each_other(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows without those whose prompt is nearly another's of the same source; which of such rows stays is the same
    for ever. Intervals are of rows that are independent, which answers to one question are not."""
    from pipelines.data.dedup import Alike

    groups = Counter(row.group for row in rows if row.group)
    doubtful = sorted((row for row in rows if groups[row.group] > 1), key=lambda row: position(row.id, seed))
    alike = Alike(doubtful)
    kept: set[tuple[str, int]] = set()
    gone: set[tuple[str, str]] = set()
    for row, prompt in zip(doubtful, alike.prompt, strict=True):
        if any((row.source, near) in kept for near in alike.same(prompt)):
            gone.add((row.source, row.id))
        else:
            kept.add((row.source, prompt))
    return [row for row in rows if (row.source, row.id) not in gone]


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


def _systems(system: str | None, *, prompt_alone: bool, beside: Serving | None) -> dict[str, str | None]:
    """The versions that are asked with another system prompt than the candidate's, and which."""
    systems = {"base": None if prompt_alone else system} | ({"champion": beside.system} if beside is not None else {})
    return {who: own for who, own in systems.items() if own != system}


def _examples(setting: Setting) -> list[dict[str, Any]]:
    """The candidate's worst answers first, by chrF, and of equals the least sure one."""
    chrf = scores.Chrf()
    given, texts = setting.answers["candidate"], setting.texts
    rows = [case.row for case in setting.cases]
    logprobs = [0.0 if math.isnan(answer.mean_logprob) else answer.mean_logprob for answer in given]
    order = sorted(range(len(rows)), key=lambda n: (chrf(given[n].text, rows[n].answer), logprobs[n]))
    return [
        {
            "messages": list(rows[n].prompt),
            "expected": rows[n].answer,
            "champion": None,
            **{who: answers[n] for who, answers in texts.items()},
        }
        for n in order[:EXAMPLES]
    ]
