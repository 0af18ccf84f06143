"""The sections of a pipeline file that judge a version: how it is evaluated, and the gates for its promotion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from infra.storage import file_digest
from pipelines.config_address import Hosted, Judge, Section
from pipelines.config_scorers import Benchmarks, Schema, Toxicity
from pipelines.config_space import did_you_mean, refused
from pipelines.evaluation.catalogue import DEFAULT, LENGTHS, METRICS, SUITES, suite_of
from registry.gates import CONTAMINATION


class Evaluation(Section):
    """The judgement on test rows. `limit` bounds how many of them are answered (a seeded sample). The suites of
    `required` must have measured something, or the version is not promoted. `answer_schema`, ``schema`` in the file, is
    what answers must be valid by; `judge` is for the suite of that name; `hosted` is one more column of quality,
    latency, cost and judge."""

    suites: tuple[str, ...] = DEFAULT
    required: tuple[str, ...] = ()
    limit: int = Field(default=200, ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**31)
    answer_schema: Schema | None = Field(default=None, alias="schema")  # pydantic's models have a `schema` of their own
    toxicity: Toxicity | None = None
    benchmarks: Benchmarks | None = None
    judge: Judge | None = None
    hosted: Hosted | None = None

    @field_validator("suites")
    @classmethod
    def _built(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in SUITES:
                raise ValueError(f"{name!r} is no suite; {did_you_mean(name, SUITES)}")
        if "quality" not in value:
            raise ValueError("has no suite that judges answers; add quality")
        return tuple(dict.fromkeys(value))

    @field_validator("required")
    @classmethod
    def _runs(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for name in value:
            if name not in SUITES:
                raise ValueError(f"{name!r} is no suite; {did_you_mean(name, SUITES)}")
            if name not in info.data.get("suites", SUITES):
                raise ValueError(f"{name} does not run; add it to suites")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _judges(self) -> Evaluation:
        if self.judge is not None and "judge" not in self.suites:
            raise refused([("judge", "is asked by the suite judge; add it to suites")])
        if self.benchmarks is not None and "benchmarks" not in self.suites:
            raise refused([("benchmarks", "are run by the suite benchmarks; add it to suites")])
        return self

    def lacks(self, metric: str) -> str | None:
        """What is missing for a metric to be measured, and what to do; None when nothing is."""
        if metric == CONTAMINATION:
            return None
        if (suite := suite_of(metric)) not in self.suites:
            return f"{metric} is measured by the suite {suite}; add it to evaluation.suites"
        needed = {
            "schema_valid": ("schema", self.answer_schema),
            "toxic_answers": ("toxicity", self.toxicity),
            "judged_good": ("judge", self.judge),
            "benchmark_score": ("benchmarks", self.benchmarks),
        }
        setting, given = needed.get(metric, ("", True))
        return f"{metric} cannot be measured without evaluation.{setting}" if given is None else None

    @property
    def labelled(self) -> list[tuple[str, Path]]:
        """What people labelled, and the sections that name it."""
        named = (("judge", self.judge), ("toxicity", self.toxicity))
        return [(name, section.labelled) for name, section in named if section is not None and section.labelled]

    def by_content(self) -> dict[str, Any]:
        """As plain JSON values, each file's digest in the place of its path."""
        values = self.model_dump(mode="json")
        for section, path in self.labelled:
            values[section]["labelled"] = file_digest(path)
        if self.toxicity is not None:
            values["toxicity"]["model"] = [
                file_digest(path) for path in sorted(self.toxicity.model.glob("*.safetensors"))
            ]
        if self.benchmarks is not None and self.benchmarks.include_path is not None:
            files = [path for path in self.benchmarks.include_path.rglob("*") if path.is_file()]
            values["benchmarks"]["include_path"] = [file_digest(path) for path in sorted(files)]
        return values


class Gate(Section):
    """One condition for promotion; see registry/gates.py for how it is decided."""

    metric: str
    must: Literal["not_worse", "better", "at_most", "at_least"]
    against: Literal["champion", "base"] | None = None
    margin: float = Field(default=0.0, ge=0)
    value: float | None = None
    slice: str | None = None
    min_rows: int = Field(default=0, ge=0)

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        if value not in METRICS and value != CONTAMINATION:
            raise ValueError(f"{value!r} is no metric; {did_you_mean(value, [*METRICS, CONTAMINATION])}")
        return value

    @field_validator("slice")
    @classmethod
    def _slice(cls, value: str | None) -> str | None:
        if value is None or value in ("source=train", "source=feedback"):
            return value
        kind, _, name = value.partition("=")
        if kind not in ("label", "language", "length") or not name:
            raise ValueError(
                f"{value!r} is no slice; there are source=train, source=feedback, label=, language= and length="
            )
        if kind == "length" and name not in LENGTHS:
            raise ValueError(f"{name!r} is no length; {did_you_mean(name, LENGTHS)}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Gate:
        if self.metric == CONTAMINATION and (self.must != "at_most" or self.slice or self.min_rows):
            raise ValueError(
                "contamination is a number of rows; write {metric: contamination, must: at_most, value: 5}"
            )
        if self.must in ("at_most", "at_least"):
            if self.value is None:
                raise ValueError(f"{self.must} needs a limit; add value: 0.8, say")
            if self.against is not None or self.margin:
                raise ValueError(f"{self.must} compares with a value; leave against and margin out")
        elif self.value is not None:
            raise ValueError(f"{self.must} compares two versions; leave value out, or use at_least")
        elif self.against is None:
            raise ValueError(f"{self.must} needs something to compare with; add against: champion, or base")
        if self.slice is not None and not METRICS[self.metric].by_row:
            raise ValueError(f"{self.metric} is measured over all rows; leave slice out")
        return self
