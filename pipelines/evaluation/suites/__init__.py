"""What versions are judged by: each suite is a file here, whose ``measure`` finds what the catalogue names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipelines import config_address
from pipelines.config_scorers import Benchmarks, Toxicity
from pipelines.data.split import position
from pipelines.evaluation import hosted as hosted_models
from pipelines.evaluation.comparison import Measured, means
from registry.datasets import Row, make_row
from registry.pricing import MachinePrice, TokenPrice

if TYPE_CHECKING:
    from deploy.decoding import Result
    from pipelines.evaluation.answers import Bench, Case

Progress = Callable[..., None]
_BASE_SAYS = 96  # tokens of the untuned base, to suites' own questions: enough to refuse, to obey or to give away
# Rows at a fixed load, for how long, how many at least, and requests at any time: 72 rows give p95 an upper end
_AT_LOAD, _LOAD_SECONDS, _LOAD_LEAST, AT_ONCE = 96, 20.0, 24, 4
# Rows that are asked one at a time, for how long, and how many at least; a hosted model, which has no such limit, fewer
_ALONE, _SECONDS, _LEAST, _HOSTED_ALONE = 96, 30.0, 6, 24


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What suites have to work with. `cases` are the test rows, `training` those that the candidate learned from, in
    no order; answers are at most `max_tokens` long, and sampled ones are served at `temperature`. `systems` has those
    whose system prompt is not `system`; `golden` are the test rows that the champion was judged by, None where they are
    not here; `schema`, `toxicity`, `benchmarks`, `judge` and `hosted_config` are those of
    the pipeline file, `machine` is the price of the machine that would serve, `prices` are those of hosted versions."""

    bench: Bench
    cases: Sequence[Case]
    training: Sequence[Row]
    system: str | None
    max_tokens: int
    seed: int
    say: Progress
    temperature: float = 0.0
    systems: Mapping[str, str | None] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None
    toxicity: Toxicity | None = None
    benchmarks: Benchmarks | None = None
    judge: config_address.Judge | None = None
    hosted_config: config_address.Hosted | None = None
    golden: Sequence[Row] | None = None
    prices: Mapping[str, TokenPrice | None] = field(default_factory=dict)
    machine: MachinePrice = field(default_factory=lambda: MachinePrice(per_machine_hour_usd=0.0))

    @cached_property
    def answers(self) -> dict[str, list[Result]]:
        """Every version's greedy answers to the test rows, asked when they are first wanted."""
        return self._ask((*self.bench.here, *self.bench.hosted), self.cases, "answers", base_most=self.base_most)

    @property
    def base_most(self) -> int:
        """How much the untuned base says to test rows: it seldom ends by itself, and twice the longest expected answer
        is enough to judge it by."""
        return 2 * max(case.completion_length for case in self.cases) + 8

    @cached_property
    def hosted(self) -> hosted_models.Answers | None:
        """The hosted model's answers to the test rows, asked when they are first wanted; None where none is named."""
        if self.hosted_config is None:
            return None
        return hosted_models.ask(
            self.hosted_config,
            self.cases,
            system=self.system,
            max_tokens=self.max_tokens,
            first=self.order[:_HOSTED_ALONE],
            progress=lambda done: self.say("answers of the hosted model", done, len(self.cases)),
        )

    @property
    def texts(self) -> dict[str, list[str | None]]:
        """The texts of every version's answers to the test rows, and of the hosted model's where it is there; None
        where a request to it failed."""
        found: dict[str, list[str | None]] = {who: [a.text for a in given] for who, given in self.answers.items()}
        if self.hosted is not None and self.hosted.said:
            found["hosted"] = [said.text if said is not None else None for said in self.hosted.said]
        return found

    @cached_property
    def order(self) -> list[int]:
        """The numbers of the test rows in the order in which they are asked one at a time."""
        return sorted(range(len(self.cases)), key=lambda n: position(self.cases[n].row.id, self.seed + 1))

    @cached_property
    def alone(self) -> dict[str, list[Result]]:
        """Every version's answers to the first rows of `order`, one request at a time."""
        self.say("latency")
        chosen = [self.cases[n] for n in self.order[:_ALONE]]
        # What the first request pays is nobody's latency
        self.bench.alone(chosen[:1], max_tokens=4, seconds=0, least=1)
        return self.bench.alone(chosen, max_tokens=self.max_tokens, seconds=_SECONDS, least=_LEAST)

    @cached_property
    def at_load(self) -> dict[str, list[Result]]:
        """The answers of versions that are here to the first rows of `order`, each row once, `AT_ONCE` requests at any
        time."""
        self.say("latency under load")
        chosen = [self.cases[n] for n in self.order[:_AT_LOAD]]
        return self.bench.at_load(
            chosen, max_tokens=self.max_tokens, seconds=_LOAD_SECONDS, least=_LOAD_LEAST, at_once=AT_ONCE
        )

    def ask(
        self, cases: Sequence[Case], what: str, *, temperature: float = 0.0, base_most: int = _BASE_SAYS
    ) -> dict[str, list[Result]]:
        """Versions' answers to other cases, greedy unless there is a `temperature`; `what` is shown meanwhile. The
        untuned base says `base_most` tokens. A hosted champion is not asked: other cases may be training text, or
        worse."""
        asked = [*self.bench.here, *(name for name in self.bench.hosted if name == "candidate")]
        return self._ask(asked, cases, what, base_most=base_most, temperature=temperature)

    def ask_all(self, cases: Sequence[Case], what: str) -> dict[str, list[Result]]:
        """Every version's greedy answers to test rows of whatever data set, a hosted champion's too; those that are in
        `cases` are not asked again."""
        known = {case.row.id: n for n, case in enumerate(self.cases)}
        new = [case for case in cases if case.row.id not in known]
        names = (*self.bench.here, *self.bench.hosted)
        asked = self._ask(names, new, what, base_most=self.base_most) if new else {name: [] for name in names}
        found = {who: iter(given) for who, given in asked.items()}
        return {
            who: [self.answers[who][n] if (n := known.get(case.row.id)) is not None else next(own) for case in cases]
            for who, own in found.items()
        }

    def _ask(
        self, names: Sequence[str], cases: Sequence[Case], what: str, *, base_most: int, temperature: float = 0.0
    ) -> dict[str, list[Result]]:
        most = dict.fromkeys(names, self.max_tokens)
        # Versions that are to serve are given what they would be given in serving
        if self.bench.versions.get("candidate") is not None:
            most["base"] = min(self.max_tokens, base_most)
        asked = len(cases) * len(most)
        return self.bench.answers(
            cases,
            max_tokens=most,
            temperature=temperature,
            seed=self.seed,
            progress=lambda done: self.say(what, done, asked),
        )

    def case(self, row: Row) -> Case | None:
        """A row of a suite's own in tokens; None when it does not fit the base's context."""
        found = self.bench.cases([row], system=self.system, max_tokens=self.max_tokens, own=self.systems)
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a suite found. `metrics` are comparisons as JSON; `rows`, where its numbers are of the test rows, has them
    for slices; `not_applicable` says of metrics why there is nothing to measure, `unavailable` why they could not be
    measured, and `doubted` why no gate may pass by them; `about` is kept, and its `notes` are shown in the report."""

    metrics: dict[str, Any]
    rows: Measured = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    doubted: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def asking(row: Row, text: str) -> Row:
    """The row with another question in its last turn."""
    return make_row([*row.prompt[:-1], {"role": row.prompt[-1]["role"], "content": text}, row.messages[-1]])


def of_own_questions(measured: Mapping[str, Mapping[str, Sequence[float | None]]], about: Mapping[str, Any]) -> Finding:
    """What was found by questions of a suite's own, of which none may fit a base's short context."""
    none = [name for name, values in measured.items() if not values["candidate"]]
    return Finding(
        metrics=means({name: values for name, values in measured.items() if name not in none}),
        not_applicable=dict.fromkeys(none, "no such question fits the base's context"),
        about=dict(about),
    )


def own_texts(names: Sequence[str]) -> dict[str, list[str]]:
    """What suites ask whatever the test rows are, by suite: a version that has learned it is not judged by it."""
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.own_texts() for name, module in modules.items() if hasattr(module, "own_texts")}


def measure(name: str, setting: Setting) -> Finding:
    """What a suite finds."""
    found: Finding = importlib.import_module(f"{__name__}.{name}").measure(setting)
    return found
