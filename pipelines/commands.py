"""Commands that make versions: demo, validate, run, schedule, study, evaluate, retrain, worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from infra.console import err, json_option, out, print_json, safe
from infra.errors import Refused

_config = click.option("-c", "--config", "path", required=True, type=click.Path(path_type=Path), help="Pipeline file.")
_SLICES = 20  # that are told on a terminal
_set = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="A setting that wins over the file's.")


@click.command()
@click.option("--quick", is_flag=True, help="A tiny model made on the spot, in a few minutes.")
@click.option("--detach", is_flag=True, help="Leave the stack running.")
def demo(quick: bool, detach: bool) -> None:
    """Everything once, on the interpreter's own documentation."""
    from pipelines import demo as script

    script.demo(quick=quick, detach=detach)


@click.command()
@_config
@_set
@json_option
def validate(path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a pipeline file and its data; every problem is named at once."""
    from pipelines import config as configs

    config = configs.load(path, overrides)
    found = configs.check(config)
    if as_json:
        print_json({"valid": True, "model": config.model, **found})
        return
    for file in found["files"]:
        first = f"{file['form']}, {file['rows_bad']} of the first {file['rows_read']} rows bad"
        out.print(f"{file['split']}: {safe(file['path'])}: {first}", markup=False)
    out.print(f"{path} is valid.", markup=False)


@click.command()
@_config
@_set
@json_option
def run(path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run a pipeline. An interrupted run goes on where it stopped. Exit code 3: the gate refused."""
    from pipelines import config as configs
    from registry.desk import only_here

    only_here("run")
    configs.check(configs.load(path, overrides))  # before anything starts
    _ready_prefect()
    from pipelines import flows
    from pipelines.progress import shown

    with shown():
        result = flows.train(config=str(path.absolute()), overrides=list(overrides))
    _tell(result, as_json)


@click.command()
@_config
@_set
@json_option
def apply(path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Watch, price and retrain a model as its file says from now on: `monitoring` and `retrain`. Nothing is trained."""
    from pipelines import plans
    from registry.desk import only_here

    only_here("apply")
    plan = plans.apply(path, overrides)
    if as_json:
        print_json({"model": plan.config.model, **plan.settings})
    else:
        out.print(f"{plan.config.model} is watched and retrained as {safe(str(path))} says.", markup=False)


@click.command()
@click.argument("model")
@click.option("--detach", is_flag=True, help="Start it in Prefect's runner instead of here.")
@json_option
def retrain(model: str, detach: bool, as_json: bool) -> None:
    """Make the next version from a model's data and the corrections people sent."""
    from registry.desk import only_here

    only_here("retrain")
    if detach:
        from monitoring import retraining

        started = {"model": model, "flow_run_id": retraining.start(model)}
        print_json(started) if as_json else out.print(f"Started flow run {started['flow_run_id']}.")
        return
    _ready_prefect()
    from pipelines import flows
    from pipelines.progress import shown

    with shown():
        result = flows.retrain(model=model)
    _tell(result, as_json)


def _ready_prefect() -> None:
    """Prefect's own lines, tracebacks too, go to its page; the terminal shows our progress and one sentence."""
    from pipelines import schedules

    schedules.check_reachable()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def _tell(result: dict[str, Any], as_json: bool) -> None:
    name = f"{result['model']}:{result['version']}"
    if as_json:
        print_json(result)
    else:
        _evaluation_table(name, result["evaluation"])
        if (best := result["best"])["trials"]:
            by = {"trials": "since all are through", "space": "since the space has no more", "user": "by `study stop`"}
            ended = by.get(best["stopped_by"], f"by tuning.budget.{best['stopped_by']}")
            failed = f", {best['failed']} of them failed" if best.get("failed") else ""
            out.print(f"search: trials begun: {best['trials']}{failed}; it ended {ended}", markup=False)
            for line in _pareto(best):
                out.print(line, markup=False)
        out.print(f"gate: {result['gate']['decision']}")
        for reason in result["gate"]["reasons"]:
            out.print(f"  {safe(reason)}", markup=False)
        serves = "and serves" if result["promoted"] else "but not promoted"
        out.print(f"{name} is registered {'for a canary' if result['canary'] else serves}.", markup=False)
    if result["refusal"]:
        if not as_json:
            err.print(f"Not promoted: {result['refusal']}.", markup=False)
        raise click.exceptions.Exit(Refused.exit_code)


def _pareto(best: dict[str, Any]) -> list[str]:
    """The trials of which none is better in every objective, and the one that was picked."""

    def words(point: dict[str, Any]) -> str:
        measured = ", ".join(f"{n} {value:,.6g}" for n, value in point.items() if n not in ("trial", "steps"))
        picked = "  <- picked" if (point["trial"], point["steps"]) == (best["trial"], best["steps"]) else ""
        return f"  trial {point['trial']}, {point['steps']} steps: {measured}{picked}"

    points = best.get("pareto") or ()  # a study that is older has none
    return ["the Pareto set, of which no trial is beaten in every objective:", *map(words, points)] if points else []


def _slices_table(evaluation: dict[str, Any], measured: list[str]) -> None:
    """The headline of each slice; the report has the other metrics."""
    from rich.table import Table

    from pipelines.evaluation.report import HEADLINES
    from registry.statistics import in_words

    metric = next((name for name in HEADLINES if name in evaluation["metrics"]), None)
    parts = {label: m[metric] for label, m in evaluation["slices"].items() if m.get(metric, {}).get("candidate")}
    if not parts:
        return
    more = f", the first {_SLICES} of {len(parts)} slices" if len(parts) > _SLICES else ""
    table = Table(title=f"{metric} by slice{more}", title_justify="left")
    others = [who for who in ("base", "champion") if who in measured]
    for column in ("slice", "rows", "candidate", *(f"against the {who}" for who in others)):
        table.add_column(column, overflow="fold")
    for label, m in list(parts.items())[:_SLICES]:
        against = (in_words(m.get(f"vs_{who}")) for who in others)
        table.add_row(safe(label), str(m["candidate"]["n"]), in_words(m["candidate"]), *against)
    out.print(table)


def _evaluation_table(name: str, evaluation: dict[str, Any]) -> None:
    """What was measured, then each comparison with what it can tell, then all that has to be said beside."""
    from rich.table import Table

    from pipelines.evaluation import agreement, power
    from pipelines.evaluation.catalogue import METRICS
    from registry.statistics import in_words

    metrics = evaluation["metrics"]
    versions = ("candidate", "base", "champion", "hosted")
    measured = [who for who in versions if any(m.get(who) for m in metrics.values())]
    table = Table(title=f"{name} on {evaluation['rows']} untouched test rows, 95 % intervals", title_justify="left")
    for column in ("metric", *measured):
        table.add_column(column, overflow="fold")
    for metric, m in metrics.items():
        table.add_row(metric, *(in_words(m.get(who)) for who in measured))
    out.print(table)
    for who in measured[1:]:
        table = Table(
            title=f"{name} against the {who}{' model' if who == 'hosted' else ''}, paired", title_justify="left"
        )
        for column in ("metric", "difference", "told", "could show", "rows that would"):
            table.add_column(column, overflow="fold")
        for metric, m in metrics.items():
            if (difference := m.get(f"vs_{who}")) is None:
                continue
            told = power.of(difference)
            form = METRICS[metric].form if metric in METRICS else "{:.3f}"
            least = f"{form.format(told.least)} or more" if told.least is not None else "–"
            rows = f"about {told.rows:,}" if told.rows is not None else ""
            table.add_row(metric, in_words(difference), told.effect, least, rows)
        out.print(table)
    _slices_table(evaluation, measured)
    out.print(
        "Could show: the smallest true difference that as many rows show in 80 % of all repetitions. "
        "Rows that would: how many show a difference as large as the one seen.",
        markup=False,
    )
    for each in evaluation.get("about", {}).values():
        for scorer, found in each.get("scorers", {}).items():
            out.print(
                f"{scorer}: {safe(agreement.in_words(found))}",
                markup=False,
            )
        for note in each.get("notes", []):
            out.print(safe(note), markup=False)
    for kind, said in (("unavailable", "is unavailable"), ("not_applicable", "was not measured")):
        for metric, why in evaluation.get(kind, {}).items():
            out.print(f"{metric} {said}: {safe(why)}.", markup=False)


@click.group()
def schedule() -> None:
    """Make a run recur, as a Prefect deployment."""


@schedule.command("add")
@click.argument("name")
@_config
@_set
@click.option("--cron", required=True, help='Five fields, such as "0 2 * * 1".')
@click.option("--timezone", default="UTC", show_default=True, help="Such as Europe/Berlin.")
@json_option
def schedule_add(name: str, path: Path, overrides: tuple[str, ...], cron: str, timezone: str, as_json: bool) -> None:
    """Add a schedule; the pipeline file is read anew at each run."""
    from pipelines import config as configs
    from pipelines import schedules

    configs.check(configs.load(path, overrides))
    _show_schedules([schedules.add(name, str(path.absolute()), list(overrides), cron, timezone)], as_json, one=True)


@schedule.command("list")
@json_option
def schedule_list(as_json: bool) -> None:
    """All schedules."""
    from pipelines import schedules

    _show_schedules(schedules.list_schedules(), as_json)


@schedule.command("pause")
@click.argument("name")
@json_option
def schedule_pause(name: str, as_json: bool) -> None:
    """Keep a schedule from firing; it stays paused over restarts."""
    from pipelines import schedules

    _show_schedules([schedules.pause(name)], as_json, one=True)


@schedule.command("resume")
@click.argument("name")
@json_option
def schedule_resume(name: str, as_json: bool) -> None:
    """Let a paused schedule fire again."""
    from pipelines import schedules

    _show_schedules([schedules.resume(name)], as_json, one=True)


@schedule.command("remove")
@click.argument("name")
@json_option
def schedule_remove(name: str, as_json: bool) -> None:
    """Delete a schedule; what it ran stays."""
    from pipelines import schedules

    gone = schedules.remove(name)
    print_json(gone) if as_json else out.print(f"Removed {safe(name)}.", markup=False)


@schedule.command("trigger")
@click.argument("name")
@json_option
def schedule_trigger(name: str, as_json: bool) -> None:
    """Start a scheduled run now."""
    from pipelines import schedules

    run = schedules.trigger(name)
    print_json(run) if as_json else out.print(f"Started flow run {run['name']} ({run['flow_run_id']}).", markup=False)


def _show_schedules(found: list[dict[str, Any]], as_json: bool, *, one: bool = False) -> None:
    if as_json:
        print_json(found[0] if one else {"schedules": found})
        return
    if not found:
        out.print('No schedules. Add one: tunesmith schedule add weekly -c my.yaml --cron "0 2 * * 1"', markup=False)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("name", "cron", "time zone", "state", "next run", "last run", "file"):
        table.add_column(column)
    for s in found:
        last = " ".join(str(part) for part in (s["last_run"] or {}).values() if part)
        state = "paused" if s["paused"] else "active"
        cells = (s["name"], s["cron"], s["timezone"], state, s["next_run"], last, s["config"])
        table.add_row(*(Text(safe(str(cell or ""))) for cell in cells))
    out.print(table)


@click.command()
@click.option("--study", "name", required=True, help="The study to work for.")
@click.option("--max-idle", type=float, help="Seconds without work after which to end; unset: when the study ends.")
def worker(name: str, max_idle: float | None) -> None:
    """A search worker, one process of one thread; may run on any machine that reaches database and artifacts."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    from infra import log
    from infra.db import transaction
    from pipelines.tuning import worker as workers
    from registry import studies

    if sys.platform == "linux" and not workers.ALLOCATOR.keys() <= os.environ.keys():
        # The C library reads these as a process starts
        command = [sys.executable, "-m", "pipelines.cli", *sys.argv[1:]]
        os.execve(sys.executable, command, workers.ALLOCATOR | os.environ)  # noqa: S606 - this very command
    log.setup()
    with transaction() as conn:
        state = studies.get(conn, name)["state"]
    if state != "running":
        out.print(f"The study {name} is {state}: there is nothing to work off.", markup=False)
        return
    workers.work(name, max_idle=max_idle)


@click.group()
def study() -> None:
    """Look into a running search, and act on it."""


@study.command("list")
@json_option
def study_list(as_json: bool) -> None:
    """All studies, newest first."""
    from infra.db import transaction
    from registry import studies

    with transaction() as conn:
        found = studies.list_studies(conn)
    if as_json:
        keys = (
            "name", "model", "state", "stopped_by", "trials", "rungs_done", "rungs_open", "best", "best_loss",
            "at_work", "created_at",
        )  # fmt: skip
        print_json({"studies": [{key: s[key] for key in keys} for s in found]})
        return
    if not found:
        out.print("No studies. `tunesmith run -c FILE` begins one.")
        return
    from rich.table import Table

    table = Table("study", "state", "trials", "rungs done", "open", "best loss", "begun")
    for s in found:
        least = s["best"]["value"] if s["best"] else s["best_loss"]
        best = "" if least is None else f"{least:.4f}"
        counts = (str(s["trials"]), str(s["rungs_done"]), str(s["rungs_open"]))
        ended = f"{s['state']} ({s['stopped_by']})" if s["stopped_by"] and s["state"] == "stopped" else s["state"]
        if s["state"] == "running" and not s["at_work"]:
            ended = "interrupted"  # the same `tunesmith run` goes on with it
        table.add_row(s["name"], ended, *counts, best, f"{s['created_at']:%Y-%m-%d %H:%M:%SZ}")
    out.print(table)


@study.command("show")
@click.argument("name")
@json_option
def study_show(name: str, as_json: bool) -> None:
    """A study's trials: how far each came, with what."""
    from infra.db import transaction
    from registry import halving, studies

    with transaction() as conn:
        row, jobs, at_work = studies.get(conn, name), studies.jobs(conn, name), studies.at_work(conn, name)
    running = row["state"] == "running"
    states = halving.states(halving.Plan.of(row["spec"]), jobs, running=running)
    last = {job.trial: job for job in jobs}  # jobs are ordered: the highest rung of each trial wins
    reached = {job.trial: job for job in jobs if job.value is not None}
    if as_json:
        trials = [
            {
                "trial": j.trial,
                "steps": j.steps,
                "state": states[j.trial],
                "loss": reached[j.trial].value if j.trial in reached else None,
                "loss_at": reached[j.trial].steps if j.trial in reached else None,
                "clone_of": j.clone_of,
                "params": j.params,
                "error": j.error,
            }
            for j in last.values()
        ]
        about = {key: row[key] for key in ("name", "model", "state", "stopped_by", "best", "seconds_left")}
        print_json(about | {"at_work": at_work, "trials": trials})
        return
    from rich.table import Table
    from rich.text import Text

    left = f", about {max(1, round(row['seconds_left'] / 60))} min left" if running and row["seconds_left"] else ""
    if running and not at_work:
        left = ", but nobody is at work: the same `tunesmith run` goes on with it"
    table = Table(
        "trial",
        "to step",
        "state",
        "loss",
        "measured at",
        "parameters",
        title=f"{name}: {row['state']}{left}",
        title_justify="left",
    )
    given = [j.params for j in last.values()]
    same = {k for k in (given[0] if len(given) > 1 else ()) if all(p.get(k) == given[0][k] for p in given)}

    def loss_of(j: studies.Job) -> float:
        return reached[j.trial].value or 0.0 if j.trial in reached else float("inf")

    for j in sorted(last.values(), key=lambda j: (-j.rung, loss_of(j))):
        differing = {k: v for k, v in j.params.items() if k not in same}
        params = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in differing.items())
        at = reached.get(j.trial)
        loss, so_far = ("", "") if at is None else (f"{at.value:.4f}", f"{at.steps} steps")
        number = str(j.trial) if j.clone_of is None else f"{j.trial}, of {j.clone_of}"
        said = params if j.error is None else f"{j.error} ({params})"
        table.add_row(number, str(j.steps), states[j.trial], loss, so_far, Text(safe(said)))
    out.print(table)
    for line in _pareto(row["best"]) if row["best"] else ():
        out.print(line, markup=False)


@study.command("storage")
def study_storage() -> None:
    """The address of Optuna's own tables, with its password: for optuna-dashboard."""
    from infra.services import sqlalchemy_url
    from infra.settings import get_settings

    click.echo(sqlalchemy_url(get_settings().database("optuna"), "psycopg"))


@study.command("stop")
@click.argument("name")
@json_option
def study_stop(name: str, as_json: bool) -> None:
    """End a running search with what it has: its run goes on to judge the best so far."""
    from infra.db import transaction
    from registry import studies

    with transaction() as conn:
        studies.stop(conn, name)
    print_json({"name": name, "state": "stopped"}) if as_json else out.print(f"Stopped {safe(name)}.", markup=False)


@study.command("resume")
@click.argument("name")
@json_option
def study_resume(name: str, as_json: bool) -> None:
    """Let a stopped search go on; run the same `tunesmith run` command again to do the work."""
    from infra.db import transaction
    from registry import studies

    with transaction() as conn:
        studies.resume(conn, name)
        at_work = studies.at_work(conn, name)
    if as_json:
        print_json({"name": name, "state": "running", "at_work": at_work})
    else:
        then = "." if at_work else "; run the same `tunesmith run` again, which goes on with it."
        out.print(f"Resumed {safe(name)}{then}", markup=False)


@study.command("prune-trial")
@click.argument("name", metavar="STUDY")
@click.argument("trial", type=click.IntRange(min=0))
@json_option
def study_prune_trial(name: str, trial: int, as_json: bool) -> None:
    """Stop one trial of a running search, at once; what it measured so far stays."""
    from pipelines.tuning import control

    done = control.prune_trial(name, trial)
    print_json(done) if as_json else out.print(f"Pruned trial {trial} of {safe(name)}.", markup=False)


@study.command("clone-trial")
@click.argument("name", metavar="STUDY")
@click.argument("trial", type=click.IntRange(min=0))
@click.option(
    "--set", "settings", multiple=True, required=True, metavar="A=B", help="What is different, as learning_rate=3e-4."
)
@json_option
def study_clone_trial(name: str, trial: int, settings: tuple[str, ...], as_json: bool) -> None:
    """Have a variant of a trial tried in a running search, before anything else is drawn."""
    from pipelines.tuning import control

    asked = control.clone_trial(name, trial, settings)
    if as_json:
        print_json(asked)
    else:
        when = "as soon as a worker is free" if asked["at_work"] else "when `tunesmith run` goes on with it"
        out.print(f"{safe(name)} tries a variant of trial {trial} {when}; see `tunesmith study show`.", markup=False)


@click.command()
@click.argument("version", metavar="MODEL:N")
@click.option("--suite", "suites", multiple=True, help="A suite, such as quality; may be given more than once.")
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="Take schema, classifier, judge, hosted model and gates from this file, and the test rows of a version that "
    "was not trained here.",
)
@click.option("--attach", metavar="REASON", help="Have the version's gates speak by this judgement from now on.")
@json_option
def evaluate(version: str, suites: tuple[str, ...], path: Path | None, attach: str | None, as_json: bool) -> None:
    """Judge a registered version again, on the test rows of its data set, against its base and the champion. Exit 3:
    rows that it learned from also stand in rows that judge, or with --attach, its gates do not pass."""
    from pipelines import judging
    from pipelines.progress import shown
    from registry.desk import only_here

    only_here("evaluate")
    with shown():
        found = judging.judge_again(version, suites, path, attach=attach)
    if as_json:
        print_json({"version": version, **found})
    else:
        _evaluation_table(version, found["evaluation"])
        for reason in found["decision"]["reasons"] if attach is not None else []:
            out.print(safe(f"gate: {reason}"), markup=False)
        if attach is None and found["gate"] is not None:
            out.print(safe(found["gate"]["reason"]), markup=False)
    decision = found.get("decision") or found["gate"]
    if decision is not None and decision["decision"] != "pass":
        raise click.exceptions.Exit(Refused.exit_code)
