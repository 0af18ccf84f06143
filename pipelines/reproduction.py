"""`tunesmith reproduce`: a version's training again, from what its bundle says, and how close it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from infra import storage
from infra.console import json_option, out, print_json, safe
from infra.db import transaction
from infra.errors import TunesmithError, UsageError
from pipelines.tuning.spec import StudySpec
from registry import studies, versions
from registry.bundle import Training
from registry.lineage import environment_of
from registry.names import parse_version

Progress = Callable[..., None]


@click.command()
@click.argument("version")
@click.option("--rows", type=click.IntRange(1), default=50, show_default=True, help="Test rows to answer with both.")
@json_option
def reproduce(version: str, rows: int, as_json: bool) -> None:
    """Train MODEL:N again from its manifest, and say how close that comes. Nothing is registered."""
    from functools import partial

    from pipelines.progress import report, shown
    from registry.desk import only_here

    only_here("reproduce")

    with shown():
        found = again(version, rows=rows, progress=partial(report, "reproduce"))
    print_json(found) if as_json else _show(found)


def recipe(study: str, best: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest must say, beside params, base, data set and prompt, for the winner's training to be repeated.

    `order_seed` orders the rows and `seed` is the trial's own; it was trained for `steps` of a schedule of
    `total_steps`, beginning from the adapter in `init_bundle` if that is not None; `loss` is what came out.
    """
    with transaction() as conn:
        spec, places = StudySpec.from_json(studies.get(conn, study)["spec"]), studies.places(conn, study)
    return {
        "order_seed": spec.seed,
        "seed": spec.trial_seed(places[best["trial"]]),
        "steps": best["steps"],
        "total_steps": spec.rungs[-1],
        "max_tokens": spec.max_tokens,
        "validation_rows": spec.validation_rows,
        "init_bundle": spec.init_bundle,
        "loss": best["value"],
    }


def again(name: str, *, rows: int, progress: Progress) -> dict[str, Any]:
    """``{"model", "version", "loss": {"then", "now"}, "identical", "distance", "predictions": {"rows", "equal"},
    "environment": {package: {"then", "now"}} or None, "code_version": {"then", "now"}, "seconds"}``.

    `distance` is ||now - then|| / ||then|| over what the adapters add to the weights (Frobenius), so that 0 is equal
    and 1.4 unrelated; `identical` says that the files' tensors are equal bit by bit.

    Raises NotFound for no such version, base or data set here, UsageError for a version whose manifest does not say
    how it was trained.
    """
    from pipelines.tuning.trainer import Member, TrialFailed
    from pipelines.tuning.worker import make_trainer
    from registry.environment import differences, lock

    model, number = parse_version(name)
    with transaction() as conn:
        version = versions.get(conn, model, number)
    manifest, then = version.parsed, version.adapter()
    try:
        how = Training.model_validate(manifest.training)
    except ValidationError:  # of an import, or an older release
        how = None
    if how is None or manifest.dataset is None or then is None:
        raise UsageError(
            f"The manifest of {name} does not say how it was trained.",
            hint="Imported adapters, prompts, and versions of older releases cannot be trained again.",
        )
    spec = StudySpec(
        study=f"reproduce {name}", model=model, base=version.base_digest, dataset=manifest.dataset,
        system=manifest.prompt.system, max_tokens=how.max_tokens, trials=1, rungs=(how.total_steps,),
        reduction=3, space={}, seed=how.order_seed, workers=1, validation_rows=how.validation_rows,
        init_bundle=how.init_bundle,
    )  # fmt: skip
    progress(f"training for {how.steps} steps")
    with storage.scratch("checkpoint") as folder:
        member = Member(
            params=manifest.params, seed=how.seed, start=None, init_adapter=spec.init_adapter(), save_to=folder
        )
        outcome = make_trainer(spec).run([member], total_steps=how.total_steps, until=how.steps)[0]
        if outcome is None or isinstance(outcome, TrialFailed):
            raise TunesmithError(f"Training {name} again failed: {outcome}.")
        identical, distance = apart(then, folder / "adapter")
        progress("answering test rows with both")
        predictions = _predictions(version, then, folder / "adapter", rows)
    environment = None
    with suppress(TunesmithError):
        made_with = environment_of(version)
        environment = differences(made_with, lock()) if made_with else None
    return {
        "model": model,
        "version": number,
        "loss": {"then": how.loss, "now": outcome.value},
        "identical": identical,
        "distance": distance,
        "predictions": predictions,
        "environment": environment,
        "code_version": {"then": manifest.code_version, "now": versions.code_version()},
        "seconds": outcome.seconds,
    }


def apart(then: Path, now: Path) -> tuple[bool, float]:
    """Whether two LoRA adapters are equal bit by bit, and ||B'A' - BA|| / ||BA|| over all their modules.

    ||BA||^2 = tr((B'B)(AA')), so nothing of the size of a weight is made. Other tensors (DoRA's magnitudes) are
    compared as they are.
    """
    import numpy as np
    from safetensors.torch import load_file

    before, after = (
        {name: t.double().numpy() for name, t in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (then, now)
    )
    if before.keys() != after.keys() or any(before[n].shape != after[n].shape for n in before):
        return False, math.inf
    moved = total = 0.0
    for name in before:
        if ".lora_B." in name:
            continue
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            a, b = before[name], before[other]
            total += _product(b, a, b, a)
            # [B' -B] [A'; A] is the difference of the products
            wide, tall = np.hstack([after[other], -b]), np.vstack([after[name], a])
            moved += max(0.0, _product(wide, tall, wide, tall))
        else:
            total += float((before[name] ** 2).sum())
            moved += float(((after[name] - before[name]) ** 2).sum())
    identical = all(np.array_equal(before[name], after[name]) for name in before)
    return identical, 0.0 if identical else math.sqrt(moved / total) if total else math.inf


def _product(b: Any, a: Any, d: Any, c: Any) -> float:
    """The inner product of BA and DC."""
    return float(((b.T @ d) * (a @ c.T)).sum())


def _predictions(version: versions.Version, then: Path, now: Path, most: int) -> dict[str, int]:
    from pipelines.evaluation.answers import Bench
    from registry import bases, datasets

    rows = datasets.open_dataset(version.parsed.dataset or "").rows("test")[:most]
    bench = Bench(bases.load(version.base_digest), {"then": then, "now": now})
    most_tokens = version.parsed.generation.max_tokens
    cases = bench.cases(rows, system=version.parsed.prompt.system, max_tokens=most_tokens)
    found = bench.answers(cases, max_tokens=dict.fromkeys(("then", "now"), most_tokens))
    equal = sum(a.text == b.text for a, b in zip(found["then"], found["now"], strict=True))
    return {"rows": len(cases), "equal": equal}


def _show(found: dict[str, Any]) -> None:
    loss, predictions = found["loss"], found["predictions"]
    name = f"{found['model']}:{found['version']}"
    lines = [
        f"{name} was trained again in {found['seconds']:.0f} s.",
        f"loss         {loss['then']:.6f} then, {loss['now']:.6f} now",
        "adapter      "
        + ("identical" if found["identical"] else f"{found['distance']:.2g} away, relative to its size"),
        f"predictions  {predictions['equal']} of {predictions['rows']} equal",
    ]
    code, environment = found["code_version"], found["environment"]
    if code["then"] != code["now"]:
        lines.append(f"code         {code['then']} then, {code['now']} now")
    if environment is None:
        lines.append("environment  not known: its bundle has none")
    for package, versions_of in (environment or {}).items():
        lines.append(f"environment  {package}: {versions_of['then']} then, {versions_of['now']} now")
    for line in lines:
        out.print(safe(line), markup=False)
