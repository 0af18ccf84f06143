"""A hosted model's answers to the test rows, for one more column beside the candidate, base and champion.

Only the test rows' prompts are sent, never what other suites ask: that may be training text, or worse. What needs the
probabilities of a given text, such as loss, cannot be had over a chat address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines import config_address
from pipelines.evaluation.address import Client, Said, Unavailable
from registry.prompts import with_system

if TYPE_CHECKING:
    from pipelines.evaluation.answers import Case

SUITES = frozenset({"quality", "latency", "cost", "judge"})
NOT_APPLICABLE = {
    "loss": "needs the probabilities of a given text, which a chat address does not tell",
    "perplexity": "needs the probabilities of a given text, which a chat address does not tell",
    "tokens_per_second": "counts tokens of its own",
    "p95_latency_at_load_ms": "serves others at the same time, at a load that is not ours to set",
}
MISSING = 0.1  # of what was asked: with more missing there are no numbers


@dataclass(frozen=True, kw_only=True)
class Answers:
    """`said` has one answer for each case, None where the request failed; `seconds` the time of those that were asked
    one at a time, by their case's number. All are empty where the model is unavailable, which `about` says."""

    said: Sequence[Said | None] = ()
    seconds: Mapping[int, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def ask(
    config: config_address.Hosted,
    cases: Sequence[Case],
    *,
    system: str | None,
    max_tokens: int,
    first: Sequence[int],
    progress: Callable[[int], None],
) -> Answers:
    """Put all cases to the model: those numbered in `first` one at a time, for their latency, the others a few at a
    time. Greedy, with the prompt of its own or `system`. An address that cannot be used gives Answers that say why."""
    own = config.system if config.system is not None else system
    about: dict[str, Any] = {"asked": config.model, "address": config.url}
    said: dict[int, Said | None] = {}
    try:
        with Client(config) as client:
            for number in first:
                said[number] = client.ask(with_system(cases[number].row.prompt, own), max_tokens=max_tokens)
                progress(len(said))
            rest = [number for number in range(len(cases)) if number not in said]
            begun = len(said)
            answers = client.ask_all(
                [with_system(cases[number].row.prompt, own) for number in rest],
                max_tokens=max_tokens,
                progress=lambda done: progress(begun + done),
            )
            said |= dict(zip(rest, answers, strict=True))
        missing = sum(answer is None for answer in said.values())
        if missing > MISSING * len(cases):
            raise Unavailable(f"{missing} of {len(cases)} requests have no answer ({_kinds(client.counts)})")
    except Unavailable as error:
        note = f"The hosted model is unavailable: {error.why}."
        return Answers(about={**about, "unavailable": error.why, "notes": [note]})
    served = sorted({answer.model for answer in said.values() if answer is not None})
    notes = [f"The hosted model is {' and '.join(served)} at {config.url}; it answered the same rows."]
    notes += client.in_words("it")
    if missing:
        notes.append("Rows without its answer are left out of its column.")
    about |= {"served": served, "not_applicable": NOT_APPLICABLE, "requests": dict(client.counts), "notes": notes}
    timed = {number: answer.seconds for number in first if (answer := said[number]) is not None}
    return Answers(said=[said[number] for number in range(len(cases))], seconds=timed, about=about)


def _kinds(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts.get(name, 0)} {name.replace('_', ' ')}" for name in ("timed_out", "limited", "failed"))
