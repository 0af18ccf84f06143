"""What a person may do to a running search: stop one of its trials, and have a variant of one tried.

Both only write to the database; the coordinator and the workers see it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from infra.db import transaction
from infra.errors import Conflict, NotFound, UsageError
from infra.settings import get_settings
from pipelines import config_file
from pipelines.config_space import KINDS, Space, did_you_mean, largest_rank
from pipelines.tuning import space as spaces
from pipelines.tuning.methods import fixed_by
from pipelines.tuning.spec import StudySpec
from registry import bases, halving, studies


def prune_trial(study: str, trial: int) -> dict[str, Any]:
    """Spend nothing more on a trial: its worker leaves it at its next step, and what it measured so far stays.

    Raises NotFound, Conflict when the study does not run or the trial is over.
    """
    with transaction() as conn:
        row = studies.lock(conn, study)
        jobs = studies.jobs(conn, study)
        last = _of(jobs, study, trial)[-1]
        _running(row)
        if ended := halving.fates(halving.Plan.of(row["spec"]), jobs)[trial]:
            raise Conflict(f"Trial {trial} of {study} is {ended} already.")
        studies.prune(conn, last)
    return {"study": study, "trial": trial, "state": "pruned"}


def clone_trial(study: str, trial: int, settings: Sequence[str]) -> dict[str, Any]:
    """Have a variant of a trial tried as soon as a worker is free, on top of the study's own trials; `settings` are
    ``learning_rate=3e-4`` and the like.

    Raises UsageError for settings that make no sense, NotFound, Conflict when the study does not run or has this
    configuration already.
    """
    wanted = dict(_setting(text) for text in settings)
    with transaction() as conn:
        row = studies.lock(conn, study)
        jobs = studies.jobs(conn, study)
        source = _of(jobs, study, trial)[0].params
        _running(row)
        spec = StudySpec.from_json(row["spec"])
        adapter = spec.init_adapter()
        if adapter and (fixed := sorted(set(wanted) & set(fixed_by(adapter)))):
            raise UsageError(f"{fixed[0]} is that of the adapter which all trials of {study} start from.")
        params = _checked({**source, **wanted}, wanted)
        with suppress(NotFound):  # on a machine that sees the database only; the trial would fail then
            spaces.check_parts({name: [params[name]] for name in wanted}, bases.load(spec.base))
        most = get_settings().max_lora_rank
        if (rank := largest_rank({"init_lora_weights": True} | params)) > most:
            raise UsageError(
                f"An adapter of rank {rank} (PiSSA's is doubled) is not served: engines here take {most} at most.",
                hint="Ask for a lower r, or raise TUNESMITH_MAX_LORA_RANK and the engines' own limit.",
            )
        twin = next((job.trial for job in jobs if job.params == params), None)
        if twin is not None:
            raise Conflict(f"Trial {twin} of {study} has this configuration already.")
        if any(variant.params == params for variant in studies.variants(conn, study)):
            raise Conflict(f"This variant was asked of {study} already.")
        studies.ask_variant(conn, study, clone_of=trial, params=params)
        at_work = studies.at_work(conn, study)
    return {"study": study, "clone_of": trial, "params": params, "state": "waiting", "at_work": at_work}


def _of(jobs: Sequence[studies.Job], study: str, trial: int) -> list[studies.Job]:
    found = [job for job in jobs if job.trial == trial]
    if not found:
        raise NotFound(f"{study} has no trial {trial}.", hint=f"See `tunesmith study show {study}`.")
    return found


def _running(row: Mapping[str, Any]) -> None:
    if row["state"] != "running":
        raise Conflict(f"The study {row['name']} is {row['state']}: its trials are over.")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise UsageError(f"--set {text} is not of the form name=value.", hint="Such as --set learning_rate=3e-4.")
    if name not in KINDS:
        raise UsageError(f"--set {name}: there is no such setting; {did_you_mean(name, KINDS)}")
    try:
        return name, config_file.value(value)
    except ValueError as error:
        raise UsageError(f"--set {name}: {error}.") from error


def _checked(params: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a space of single values, which has the same rules. Raises UsageError."""
    from pydantic import ValidationError

    for name, value in wanted.items():
        if isinstance(value, dict) or value is None:
            raise UsageError(f"--set {name}: {name} needs one value.", hint=f"Such as --set {name}=...")
    try:
        space = Space(**{name: [value] if isinstance(value, list) else value for name, value in params.items()})
    except ValidationError as error:
        first = error.errors()[0]
        cause = str(first.get("ctx", {}).get("error", first["msg"])).partition("; take one of the two out")[0]
        field = ".".join(str(part) for part in first["loc"])
        if field.partition(".")[0] in wanted:
            raise UsageError(f"--set {field}: {cause}.") from error
        asked = ", ".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in wanted.items()
        )
        raise UsageError(f"--set {asked} does not go with the trial's {field}: {cause}.") from error
    whole = space.model_dump(mode="json")
    return {n: whole[n][0] if isinstance(whole[n], list) else whole[n] for n in params}
