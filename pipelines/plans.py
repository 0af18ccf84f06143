"""What a run is to do, as known before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from infra import storage
from infra.db import transaction
from infra.errors import NotFound, UsageError
from pipelines import config as configs
from pipelines import judging, runs, schedules
from registry import datasets, versions
from registry.datasets import Row


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known before a run begins. `champion` is the version that serves now, if one does."""

    kind: runs.Kind
    config: configs.PipelineConfig
    config_path: Path
    champion: versions.Version | None
    overrides: tuple[str, ...] = ()
    corrections: tuple[Row, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What serving and watching must know of the pipeline file."""
        values = self.config.jsonable()
        return {
            "config_path": str(self.config_path),
            "overrides": list(self.overrides),
            "monitoring": values["monitoring"],
            "retrain": values["retrain"],
        }

    @property
    def fingerprint(self) -> str:
        """Same configuration, data and corrections: the same run, which is then resumed."""
        return storage.text_digest("\n".join([self.config.fingerprint(), *(row.id for row in self.corrections)]))


def apply(path: Path, overrides: Sequence[str]) -> Plan:
    """Have a model watched, priced and retrained as its file says, from now on, and its schedules with it; nothing is
    trained. Raises ConfigError, NotFound where no run has made the model yet, Unreachable without Prefect."""
    config = configs.load(path, overrides)
    plan = Plan(kind="train", config=config, config_path=path.absolute(), champion=None, overrides=tuple(overrides))
    schedules.check_reachable()
    with transaction() as conn:
        values = {"model": config.model, "settings": Jsonb(plan.settings)}
        if conn.execute(runs.SQL["save_model_settings"], values).rowcount == 0:
            raise NotFound(f"There is no model {config.model}.", hint="`tunesmith run -c FILE` makes it.")
    ensure_schedules(config)
    return plan


def ensure_schedules(config: configs.PipelineConfig) -> None:
    """What a model's file has done at some time, or after a verdict."""
    if config.retrain is not None:
        schedules.ensure_retrain(config.model)
    schedules.ensure_rescore(config.model, config.monitoring.rescore)


def train(path: Path, overrides: list[str]) -> Plan:
    """Read a pipeline file. Raises ConfigError with every problem, NotFound when it is not there."""
    config = configs.load(path, overrides)
    configs.check(config)
    return Plan(
        kind="train",
        config=config,
        config_path=path.absolute(),
        champion=judging.champion_of(config.model),
        overrides=tuple(overrides),
    )


def retrain(model: str) -> Plan:
    """Read the pipeline file of the model's last run, and the corrections that came since.

    Raises NotFound for no such model or no file, UsageError when there are fewer corrections than
    ``retrain.min_rows``.
    """
    with transaction() as conn:
        row = conn.execute(runs.SQL["model_settings"], {"model": model}).fetchone()
        if row is None or "config_path" not in row["settings"]:
            raise NotFound(f"No pipeline ever ran for a model {model}.", hint="`tunesmith run -c FILE` first.")
        found = conn.execute(runs.SQL["corrections"], {"model": model}).fetchall()
    path = Path(row["settings"]["config_path"])
    overrides = row["settings"].get("overrides", [])
    config = configs.load(path, overrides)
    if not config.trains:
        raise UsageError(f"{path} trains nothing, so there is nothing to train again.", hint="`tunesmith run -c FILE`.")
    champion = judging.champion_of(model)
    if champion is None or champion.dataset_digest is None:
        raise NotFound(f"No version of {model} serves that was trained here.", hint="`tunesmith promote` one first.")
    corrections = tuple(
        datasets.make_row(
            [*(m for m in f["messages"]), {"role": "assistant", "content": f["correction"]}], source="feedback"
        )
        for f in found
    )
    known = {r.id for split in datasets.SPLITS for r in datasets.open_dataset(champion.dataset_digest).rows(split)}
    corrections = tuple(row for row in corrections if row.id not in known)
    least = config.retrain.min_rows if config.retrain else 1
    if len(corrections) < least:
        raise UsageError(
            f"There are {len(corrections)} new corrections for {model}; retraining needs {least} (retrain.min_rows).",
            hint=f"Send more with `tunesmith feedback {model} FILE`; the model must keep text (monitoring.keep_text).",
        )
    return Plan(
        kind="retrain",
        config=config,
        config_path=path,
        champion=champion,
        overrides=tuple(overrides),
        corrections=corrections,
    )
