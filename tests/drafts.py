"""Versions as a pipeline would make them, without training."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np

from registry import bases, mlflow, versions
from registry.gates import Gate, decide
from registry.profile import build
from registry.statistics import mean_ci, paired_difference
from registry.versions import Version, VersionDraft


def _evaluation(gain: float) -> dict[str, Any]:
    random = np.random.default_rng(1)
    base = random.normal(3, 0.5, 200)
    candidate = base - gain + random.normal(0, 0.05, 200)
    return {
        "metrics": {
            "loss": {
                "candidate": mean_ci(candidate, higher_is_better=False).to_json(),
                "base": mean_ci(base, higher_is_better=False).to_json(),
                "champion": None,
                "vs_base": paired_difference(candidate, base, higher_is_better=False).to_json(),
                "vs_champion": None,
            }
        },
        "slices": {},
        "rows": 200,
        "suites": ["quality"],
        "examples": [],
    }


def make_draft(model: str, base: bases.Base, adapter: Path, *, gain: float = 0.5, seed: int = 1) -> VersionDraft:
    """A judged version that passed its gate; another `seed` makes another bundle."""
    evaluation = _evaluation(gain)
    gate = Gate(metric="loss", must="better", against="base")
    return VersionDraft(
        model=model,
        method="lora",
        base=base,
        adapter=adapter,
        system="Be <brief>.",
        study=f"{model}-study",
        trial=3,
        params={"r": 4, "learning_rate": 1e-5, "seed": seed},
        evaluation=evaluation,
        decision=decide([gate], evaluation, on_underpowered="refuse", first=True),
        profile=build([], []).to_json(),
        report_html="<h1>report</h1>",
    )


def make_version(draft: VersionDraft) -> Version:
    """Registered as a pipeline run does it."""
    run = mlflow.start_run(mlflow.experiment_of(draft.model), "train")
    version = versions.register(versions.seal(draft), run_id=uuid.uuid4(), mlflow_run_id=run)
    mlflow.end_run(run)
    return version
