"""What versions are judged by: each suite is a file here, whose ``measure`` finds what the catalogue names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipelines.config_scorers import Toxicity
from pipelines.evaluation.comparison import Measured, means
from registry.datasets import Row, make_row

if TYPE_CHECKING:
    from deploy.decoding import Result
    from pipelines.evaluation.answers import Bench, Case

Progress = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What suites have to work with. `cases` are the test rows, `training` those that the candidate learned from, in
    no order; answers are at most `max_tokens` long, and sampled ones are served at `temperature`. `schema` and
    `toxicity` are those of the pipeline file."""

    bench: Bench
    cases: Sequence[Case]
    training: Sequence[Row]
    system: str | None
    max_tokens: int
    seed: int
    say: Progress
    temperature: float = 0.0
    schema: Mapping[str, Any] | None = None
    toxicity: Toxicity | None = None

    @cached_property
    def answers(self) -> dict[str, list[Result]]:
        """Every version's greedy answers to the test rows, asked when they are first wanted."""
        return self.ask(self.cases, "answers")

    def ask(self, cases: Sequence[Case], what: str, *, temperature: float = 0.0) -> dict[str, list[Result]]:
        """Every version's answers to other cases, greedy unless there is a `temperature`; `what` is shown meanwhile."""
        most = dict.fromkeys(self.bench.versions, self.max_tokens)
        # The untuned base seldom ends by itself; twice the longest expected answer is enough to judge it by. Versions
        # that are to serve are given what they would be given in serving.
        if self.bench.versions["candidate"] is not None:
            most["base"] = min(self.max_tokens, 2 * max(case.completion_length for case in self.cases) + 8)
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
        found = self.bench.cases([row], system=self.system, max_tokens=self.max_tokens)
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a suite found. `metrics` are comparisons as JSON; `rows`, where its numbers are of the test rows, has them
    for slices; `not_applicable` says of metrics why there is nothing to measure, `unavailable` why they could not be
    measured; `about` is kept, and its `notes` are shown in the report."""

    metrics: dict[str, Any]
    rows: Measured = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def asking(row: Row, text: str) -> Row:
    """The row with another question in its last turn."""
    return make_row([*row.prompt[:-1], {"role": row.prompt[-1]["role"], "content": text}, row.messages[-1]])


def of_own_questions(measured: Mapping[str, Mapping[str, Sequence[float]]], about: Mapping[str, Any]) -> Finding:
    """What was found by questions of a suite's own, of which none may fit a base's short context."""
    none = [name for name, values in measured.items() if not values["candidate"]]
    return Finding(
        metrics=means({name: values for name, values in measured.items() if name not in none}),
        not_applicable=dict.fromkeys(none, "no such question fits the base's context"),
        about=dict(about),
    )


def measure(name: str, setting: Setting) -> Finding:
    """What a suite finds."""
    found: Finding = importlib.import_module(f"{__name__}.{name}").measure(setting)
    return found
