"""StudySpec: all that a search's coordinator and workers must know, kept as JSON in `study.spec`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra import storage
from pipelines.tuning.methods import packable
from registry.halving import Plan, brackets, places


@dataclass(frozen=True, kw_only=True)
class StudySpec(Plan):
    """The plan, and what trials are made of. `space` is the YAML's section. With `init_bundle`, the
    digest of a version's bundle, every trial starts from its adapter's weights. `max_tokens` bounds a row.
    `adapters_per_pass` 0 is measured by the study's first worker. Trials are validated on at most `validation_rows`,
    a seeded sample. `objectives`, `pick` and `constraints` are those of tuning/objectives.py."""

    study: str
    model: str
    base: str
    dataset: str
    system: str | None
    max_tokens: int
    space: dict[str, Any]
    sampler: str = "tpe"
    seed: int = 0
    adapters_per_pass: int = 0
    validation_rows: int | None = None
    max_minutes: float | None = None
    max_training_tokens: int | None = None
    max_usd: float | None = None
    machine_usd_per_hour: float | None = None  # the file's price of a machine; the settings' without one
    init_bundle: str | None = None
    warm_start: list[dict[str, Any]] = field(default_factory=list)
    objectives: list[str] = field(default_factory=lambda: ["loss"])
    pick: dict[str, Any] | None = None

    def init_adapter(self) -> Path | None:
        """The folder of the adapter to start from. Raises NotFound when the store does not have it."""
        return storage.get("bundle", self.init_bundle) / "adapter" if self.init_bundle else None

    def weighs(self, measure: str) -> bool:
        """Whether trials are compared by a measure."""
        return measure in (*self.objectives, *self.constraints, (self.pick or {}).get("then"))

    def trial_seed(self, place: int) -> int:
        """The seed of all that is random in the trial of that place (`studies.places`), but for the order of the
        rows."""
        return self.seed * 100_003 + place

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"rungs": list(self.rungs)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StudySpec:
        return cls(**value | {"rungs": tuple(value["rungs"])})


def rungs(max_steps: int, *, number: int, reduction: int) -> tuple[int, ...]:
    """Steps of each rung, a geometric series that ends at `max_steps` (Jamieson and Talwalkar 2016, successive
    halving); rungs of less than one step are left out."""
    steps = [math.ceil(max_steps / reduction ** (number - 1 - k)) for k in range(number)]
    return tuple(dict.fromkeys(steps))


def reaching(spec: StudySpec) -> list[int]:
    """How many trials reach each rung, when none fails."""
    counts = [0] * len(spec.rungs)
    for group in brackets(spec):
        size = len(group)
        for rung in range(len(spec.rungs)):
            counts[rung] += size
            size = places(spec, size)
    return counts


def alone(spec: StudySpec, rung: int) -> int:
    """Steps of a rung by itself."""
    return spec.rungs[rung] - (spec.rungs[rung - 1] if rung else 0)


def packs(members: Sequence[tuple[int, Mapping[str, Any]]], *, most: int, workers: int) -> dict[int, int]:
    """Which trial leads the pack of each: those that train in one pass agree in batch size and accumulation.

    `members` are trial numbers and params; at most `most` are in a pack, and none stays large while a worker would be
    idle. A function of its arguments alone.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for trial, params in members:
        size = params["per_device_train_batch_size"], params.get("gradient_accumulation_steps", 1)
        alike.setdefault(size if packable(params) else (trial,), []).append(trial)
    found: list[list[int]] = []
    for group in alike.values():
        count = -(-len(group) // most)
        if count > workers:  # so that all have about as much
            count = min(-(-count // workers) * workers, len(group))
        found += [group[n::count] for n in range(count)]
    while len(found) < workers and len(largest := max(found, key=len, default=[])) > 1:
        found.remove(largest)
        found += [largest[::2], largest[1::2]]
    return {trial: min(group) for group in found for trial in group}
