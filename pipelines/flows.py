"""The only file that knows Prefect: the flows, and their deployments.

A flow reads as a table of contents; what the stages do stands in `pipelines/stages.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.errors import TunesmithError, UsageError
from infra.settings import get_settings

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_API_URL", get_settings().need("prefect_url"))

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.runtime import deployment
from prefect.runtime import flow_run as current
from prefect.schedules import Cron
from prefect.states import Cancelled, Failed

from monitoring import golden
from pipelines import judging, plans, rescoring, runs, schedules, stages
from pipelines.progress import report
from pipelines.runs import Run
from registry.statistics import in_words

_WAIT = 5.0  # seconds between looks whether the model's other run has ended
_ROOT = Path(__file__).resolve().parent.parent
_stage = task(cache_policy=NO_CACHE, persist_result=False)

prepare = _stage(stages.prepare, name="prepare")
search = _stage(stages.search, name="search")
evaluate = _stage(stages.evaluate, name="evaluate")
register = _stage(stages.register, name="register")


@flow(name="train", flow_run_name="train {config}", persist_result=False, validate_parameters=True)
def train(config: str, overrides: list[str] | None = None) -> Any:
    """Turn a pipeline file into a registered version, promoted when its gates pass.

    Args:
        config: path of the pipeline file, read anew at each run
        overrides: settings such as `tuning.trials=4` that win over the file's
    """
    return _told(lambda: _in_turn(plans.train(Path(config), overrides or [])))


@flow(name="retrain", flow_run_name="retrain {model}", persist_result=False, validate_parameters=True)
def retrain(model: str, request: str | None = None) -> Any:
    """Make the next version of a model from its data and the corrections people sent.

    Args:
        model: the model's name
        request: id of the retrain request that a drift verdict wrote, for who reads the run; none when started by hand
    """
    return _told(lambda: _in_turn(plans.retrain(model)))


@flow(name="rescore", flow_run_name="rescore {model}", persist_result=False, validate_parameters=True)
def rescore(model: str) -> Any:
    """Ask the version that serves a model its golden set again, and keep how well it did.

    Args:
        model: the model's name
    """
    return _told(lambda: _rescored(model))


def _rescored(model: str) -> Any:
    if reason := schedules.why_not(current.get_id()):
        return Cancelled(message=reason)
    if judging.champion_of(model) is None:
        return Cancelled(message=f"No version of {model} serves yet.")
    found = rescoring.again(model)
    create_markdown_artifact(key=f"{model}-golden", markdown=golden.in_a_sentence(found))
    return found


def _told(work: Callable[[], Any]) -> Any:
    """A person's command gets the error; of a run that Prefect started, its page gets the sentence."""
    try:
        return work()
    except TunesmithError as error:
        if deployment.get_id() is None:
            raise
        return Failed(message=f"{error.message} {error.hint}".strip())


def _in_turn(plan: plans.Plan) -> Any:
    """What Prefect started waits for another run of the model to end; a person's command is refused by `begin`."""
    said = None
    while deployment.get_id() is not None:
        if reason := schedules.why_not(current.get_id()):
            return Cancelled(message=reason)
        if (holder := runs.in_progress(plan.config.model)) is None:
            break
        if holder != said:
            report("run", f"waits for another run of {plan.config.model} to end ({holder})")
            said = holder
        time.sleep(_WAIT)
    return _carry_out(plan)


def _carry_out(plan: plans.Plan) -> Any:
    with stages.begin(plan, flow_run_id=uuid.UUID(current.get_id())) as run:
        data = prepare(plan, run)
        best = search(plan, run, data)
        judged = evaluate(plan, run, data, best)
        result = register(plan, run, data, best, judged)
        _artifacts(run, result)
        run.complete(result)
    return result


def _artifacts(run: Run, result: dict[str, Any]) -> None:
    """What Prefect's page shows of a run."""
    key = f"{run.model}-{str(run.id)[:8]}"
    create_table_artifact(
        key=f"{key}-evaluation",
        table=[
            {
                "metric": name,
                "candidate": in_words(m["candidate"]),
                "vs champion": in_words(m.get("vs_champion")),
                "vs base": in_words(m.get("vs_base")),
                "champion": in_words(m.get("champion")),
                "base": in_words(m["base"]),
            }
            for name, m in result["evaluation"]["metrics"].items()
        ],
        description=f"{run.model}:{result['version']} on untouched test rows, with 95 % intervals",
    )
    reasons = "\n".join(f"- {reason}" for reason in result["gate"]["reasons"])
    create_markdown_artifact(
        key=f"{key}-gate",
        markdown=f"# {run.model}:{result['version']}: gate {result['gate']['decision']}\n\n{reasons}\n\n"
        f"Promoted: {'yes' if result['promoted'] else 'by a canary, step by step' if result['canary'] else 'no'}\n",
    )
    create_link_artifact(key=f"{key}-mlflow", link=result["mlflow_url"], link_text="The run in MLflow")


def deploy_schedule(name: str, *, config: str, overrides: list[str], cron: str, timezone: str) -> None:
    """Create the Prefect deployment ``train/<name>``; raises UsageError for a wrong cron expression or time zone."""
    try:
        schedule = Cron(cron, timezone=timezone, slug="main")
    except ValueError as error:
        raise UsageError(
            f"{cron!r} in {timezone!r} is not a schedule.", hint='Such as --cron "0 2 * * 1" --timezone Europe/Berlin.'
        ) from error
    _deploy("pipelines.flows.train", name, {"config": config, "overrides": overrides}, schedule)


def deploy_retrain(model: str) -> None:
    """Create the Prefect deployment ``retrain/<model>``, which a drift verdict or a person starts."""
    _deploy("pipelines.flows.retrain", model, {"model": model, "request": None}, None)


def deploy_rescore(model: str, cron: str) -> None:
    """Create the Prefect deployment ``rescore/<model>``, or give it other times; the expression is checked."""
    _deploy("pipelines.flows.rescore", model, {"model": model}, Cron(cron, timezone="UTC", slug="main"))


def _deploy(entrypoint: str, name: str, parameters: dict[str, Any], schedule: Any) -> None:
    # `deploy` draws tables, and a command's output is its result
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        flow.from_source(str(_ROOT), entrypoint).deploy(
            name,
            work_pool_name=get_settings().work_pool,
            parameters=parameters,
            schedule=schedule,
            tags=["tunesmith"],
            # The lease run:<model> guards for sure; this keeps later runs of one schedule waiting visibly
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            print_next_steps=False,
            ignore_warnings=True,
        )
