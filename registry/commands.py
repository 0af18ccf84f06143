"""Commands on versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from infra.console import json_option, out, print_json, safe
from infra.errors import TunesmithError, Unreachable, UsageError
from registry.desk import desk
from registry.names import check_model_name, parse_ref, parse_share, parse_version

_reason = click.option("--reason", required=True, help="Why; it stays in the ledger.")
_why = click.option("--reason", default="", help="Why; it stays in the ledger.")
_expect = click.option(
    "--expect-generation", type=click.IntRange(min=0), help="Refuse (exit 4) if the deployment is at another one."
)
_force = click.option("--force", is_flag=True, help="Override the gate; the ledger shows it for ever.")
_stop = click.option("--stop", is_flag=True, help="Take it off again; name the model alone.")


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List models and what serves."""
    found = desk().models()
    if as_json:
        print_json(found)
        return
    if not found["models"]:
        out.print("No models yet. Make one: tunesmith run -c FILE, or tunesmith demo.")
        return
    slots = ("champion", "challenger", "shadow")
    rows = [[m["model"], m["versions"], *(m[slot] for slot in slots), m["generation"]] for m in found["models"]]
    _table(("model", "versions", *slots, "generation"), rows)


@click.command()
@click.argument("model")
@json_option
def versions(model: str, as_json: bool) -> None:
    """List a model's versions."""
    body = desk().versions(model)
    found = body["versions"]
    if as_json:
        print_json(body)
        return
    if not found:
        out.print(f"{model} has no versions yet.")
        return
    names = sorted({name for v in found for name in v["metrics"]})
    rows = [
        [v["version"], _time(v["created_at"]), v["serving"], v["gate"], v["base"], v["method"]]
        + [v["metrics"].get(name) for name in names]
        for v in found
    ]
    _table(("version", "created", "serving", "gate", "base", "method", *names), rows)


@click.command()
@click.argument("version")
@json_option
def show(version: str, as_json: bool) -> None:
    """Show one version: MODEL:N, MODEL@SLOT, or MODEL for its champion."""
    facts = desk().show(parse_ref(version))
    if as_json:
        print_json(facts)
        return
    gate, evaluation = facts["gate"], facts["evaluation"]
    flat = {**facts, "base": f"{facts['base']['id']} ({facts['base']['digest']})"}
    flat |= {"prompt": facts["prompt"]["system"], "created_at": _time(facts["created_at"])}
    if facts["hosted"]:
        asked = [f"{each['model']} at {each['upstream']}" for each in facts["hosted"]["models"]]
        flat |= {"base": None, "hosted": ", then ".join(asked)}
    flat |= {"gate": gate["decision"] if gate else "never judged"}
    if gate and gate.get("champion") is not None:
        flat["gate"] += f", beside version {gate['champion']}"
    for name in ("generation", "params"):
        flat[name] = ", ".join(f"{key} {value}" for key, value in facts[name].items())
    if gate:
        flat["evidence"] = gate["evidence"]
    if again := facts["judged_again"]:
        flat["gate"] += f", judged again at {_time(again['at'])} by {again['actor']}: {again['reason']}"
    for name in ("metrics", "evaluation", "approvals", "judged_again"):
        del flat[name]
    title = f"{facts['model']}:{facts['version']}"
    _table(("", title), [[key, value] for key, value in flat.items() if value is not None])
    if evaluation:
        columns = ("candidate", "base", "champion", "vs_base", "vs_champion")
        rows = [[name, *(_estimate(m.get(c)) for c in columns)] for name, m in evaluation["metrics"].items()]
        _table((f"on {evaluation['rows']} test rows", *(c.replace("_", " ") for c in columns)), rows)
    for reason in gate["reasons"] if gate else []:
        out.print(safe(f"gate: {reason}"), markup=False)
    agreed = facts["approvals"]
    for given in agreed["given"]:
        line = f"approved by {given['actor']} ({given['role']}) at {_time(given['at'])}: {given['reason']}"
        out.print(safe(line), markup=False)
    if agreed["missing"]:
        out.print(safe(f"not to be promoted yet: {agreed['outstanding']}"), markup=False)


@click.command()
@click.argument("first")
@click.argument("second")
@json_option
def compare(first: str, second: str, as_json: bool) -> None:
    """Compare two versions by their own evaluations, side by side."""
    found = desk().compare(parse_ref(first), parse_ref(second))
    if as_json:
        print_json(found)
        return
    metrics = found["metrics"]
    rows = [[name, _estimate(m["a"]), _estimate(m["b"]), m["better"] or "not clear"] for name, m in metrics.items()]
    _table(("metric", f"a: {found['a']}", f"b: {found['b']}", "clearly better"), rows)
    for key, sides in found["differences"].items():
        out.print(safe(f"{key}: {_short(sides['a'])} -> {_short(sides['b'])}"), markup=False)
    if not found["same_rows"]:
        out.print("The two were not judged on the test rows of one data set.")


@click.command()
@click.argument("version")
@json_option
def verify(version: str, as_json: bool) -> None:
    """Check a version's files, evidence, MLflow copy and base, and the ledger's chain. Exit 1: something is wrong."""
    found = desk().verify(*parse_version(version))
    states = {check["state"] for check in found["checks"]}
    if as_json:
        print_json(found)
    else:
        _table(("check", "state", "detail"), [[c["name"], c["state"], c["detail"]] for c in found["checks"]])
    if "failed" in states:
        raise click.exceptions.Exit(TunesmithError.exit_code)
    if "unreachable" in states:
        raise click.exceptions.Exit(Unreachable.exit_code)


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The model it becomes a version of.")
@click.option("--base", help="The base, when the adapter's config does not name it well.")
@click.option("--mlflow", metavar="URL", help="Of another MLflow server; PATH is then models:/NAME/VERSION.")
@json_option
def import_(path: Path, model: str, base: str | None, mlflow: str | None, as_json: bool) -> None:
    """Bring in a PEFT adapter's folder, an exported version, or one of another MLflow, as the model's next version."""
    if mlflow is None:
        made = desk().import_(path, check_model_name(model), base=base)
    else:
        from registry.exchange import fetched_from_mlflow

        found = re.fullmatch(r"models:/([^/]+)/([1-9][0-9]{0,8})", str(path))
        if found is None or not mlflow.startswith(("http://", "https://")):
            raise UsageError(
                "With --mlflow http://..., PATH is models:/NAME/VERSION.", hint="Such as models:/my-model/7."
            )
        with fetched_from_mlflow(mlflow.rstrip("/"), found[1], int(found[2])) as fetched:
            made = desk().import_(fetched, check_model_name(model), base=base)
    if as_json:
        print_json(made)
    else:
        name = f"{made['model']}:{made['version']}"
        out.print(f"{name} is registered ({made['method']}, {made['bundle']}).", markup=False)


@click.command()
@click.argument("version")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--hub", is_flag=True, help="Adapter and card alone, as a Hugging Face repository has them.")
@json_option
def export(version: str, path: Path, hub: bool, as_json: bool) -> None:
    """Write a version's files to a new folder; its adapter/ loads in PEFT and vLLM as it is (DoRA in PEFT alone)."""
    if hub:
        import tempfile

        from registry.exchange import for_hub

        with tempfile.TemporaryDirectory(prefix="tunesmith-export-") as scratch:
            done = desk().export(parse_ref(version), Path(scratch, "bundle"))
            for_hub(Path(scratch, "bundle"), path)
    else:
        done = desk().export(parse_ref(version), path)
    if as_json:
        print_json({**done, "path": str(path.absolute())})
    else:
        out.print(f"{done['model']}:{done['version']} is in {path}.", markup=False)
        if again := desk().show(parse_ref(version))["judged_again"]:
            said = f"Its files have its first judgement; that of {_time(again['at'])} stays here: {again['reason']}"
            out.print(safe(said), markup=False)


@click.command()
@click.argument("version")
@json_option
def sign(version: str, as_json: bool) -> None:
    """Sign MODEL:N's files with the key that TUNESMITH_SIGNING_KEY names, as is done to new versions anyway."""
    done = desk().sign(*parse_version(version))
    if as_json:
        print_json(done)
    else:
        out.print(f"{version} is signed by the key {done['signed_by']}.", markup=False)


@click.command()
@click.argument("version")
@click.option("--reason", required=True, help="Why; it stays on the record.")
@json_option
def delete(version: str, reason: str, as_json: bool) -> None:
    """Delete MODEL:N, its files and its copy in MLflow. Exit 3: it serves or served, so one could roll back to it."""
    model, number = parse_version(version)
    done = desk().delete(model, number, reason=reason)
    if as_json:
        print_json(done)
    elif done["changed"]:
        out.print(f"{version} is deleted; its evidence and this deletion stay on record.", markup=False)
    else:
        out.print(f"{version} was deleted by {done['actor']} at {_time(done['at'])}: {done['reason']}", markup=False)


@click.command()
@click.argument("version")
@_reason
@_expect
@_force
@json_option
def promote(version: str, reason: str, expect_generation: int | None, force: bool, as_json: bool) -> None:
    """Make MODEL:N serve. Exit 3: its gate refuses; 4: someone changed the deployment first."""
    model, number = parse_version(version)
    change = desk().promote(model, number, reason=reason, expect=expect_generation, force=force)
    _told(change, f"{model}:{number} serves", as_json)


@click.command()
@click.argument("version")
@click.option("--reason", required=True, help="Why; it stays on the record.")
@click.option("--gate", metavar="DIGEST", help="Of the decision that you read (`show`): exit 4 if it is another now.")
@json_option
def approve(version: str, reason: str, gate: str | None, as_json: bool) -> None:
    """Agree that MODEL:N may serve, where its pipeline asks for approvals. Exit 3: you are its author."""
    now = desk().approve(*parse_version(version), reason=reason, gate=gate)
    if as_json:
        print_json(now)
        return
    already = "" if now["changed"] else " already"
    rest = f"; {now['missing']} of {now['needed']} missing" if now["missing"] else f", {now['needed']} needed"
    name = f"{now['model']}:{now['version']}"
    out.print(f"You approved of {name}{already} ({len(now['given'])} given{rest}).", markup=False)


@click.command()
@click.argument("model")
@_reason
@click.option("--to", type=click.IntRange(1, 999_999_999), help="The version to go back to; else the one before.")
@_expect
@json_option
def rollback(model: str, reason: str, to: int | None, expect_generation: int | None, as_json: bool) -> None:
    """Take the last promotion back. Exit 3: nothing served before; 4: someone changed the deployment first."""
    change = desk().rollback(check_model_name(model), reason=reason, to=to, expect=expect_generation)
    _told(change, f"{model}:{change['champion']} serves", as_json)


@click.command()
@click.argument("target", metavar="MODEL:N | MODEL --stop")
@click.option("--share", help="Of the traffic: 10% or 0.1.")
@_stop
@_why
@_expect
@_force
@json_option
def canary(
    target: str,
    share: str | None,
    stop: bool,
    reason: str,
    expect_generation: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Give a version a share of the traffic, as the challenger; or take it off again."""
    if stop:
        _stop_slot(target, "challenger", reason, expect_generation, as_json)
        return
    if share is None:
        raise UsageError("A canary needs a share.", hint="Such as --share 10%.")
    model, number = parse_version(target)
    part = parse_share(share)
    change = desk().canary(model, number, share=part, reason=reason, expect=expect_generation, force=force)
    _told(change, f"{model}:{number} gets {100 * part:.4g} % of the traffic", as_json)


@click.command()
@click.argument("target", metavar="MODEL:N | MODEL")
@click.option("--steps", help="The shares of the traffic, one after the other: 1%,5%,25%,50% unless given; then all.")
@click.option("--min-requests", type=int, help="Of the version's, that a step takes at least (100).")
@click.option("--min-minutes", type=float, help="That a step takes at least (10).")
@click.option("--max-hours", type=float, help="After which a step that had too few requests ends it (24).")
@click.option("--ignore", multiple=True, metavar="WHAT", help="What may be worse, as long: longer answers. Repeatable.")
@_why
@_expect
@json_option
def rollout(
    target: str,
    steps: str | None,
    min_requests: int | None,
    min_minutes: float | None,
    max_hours: float | None,
    ignore: tuple[str, ...],
    reason: str,
    expect_generation: int | None,
    as_json: bool,
) -> None:
    """Give a version more and more traffic, to be promoted or taken back by what it shows; without N, how that goes.

    `tunesmith canary MODEL --stop` ends it.
    """
    if ":" not in target:
        _show_rollout(desk().rollout(check_model_name(target)), as_json)
        return
    model, number = parse_version(target)
    shares = [parse_share(part) for part in steps.split(",")] if steps is not None else None
    wanted = {"steps": shares, "min_requests": min_requests, "min_minutes": min_minutes, "max_hours": max_hours}
    plan: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    plan |= {"ignore": list(ignore)} if ignore else {}
    change = desk().begin_rollout(model, number, plan, reason=reason, expect=expect_generation)
    share = f"{100 * change['challenger_share']:.4g} %"
    _told(change, f"{model}:{number} gets {share} of the traffic, to be stepped by what it shows", as_json)


def _show_rollout(now: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(now)
        return
    name, steps = f"{now['model']}:{now['version']}", now["plan"]["steps"]
    ended = {"running": "", "promoted": "promoted, ", "taken_back": "taken back, ", "stopped": "stopped, "}[
        now["state"]
    ]
    at = f"step {now['step'] + 1} of {len(steps)} ({100 * now['share']:.4g} % of the traffic)"
    since = _time(now["ended_at"] or now["step_at"])
    said = f": {now['said']}" if now["said"] else ""
    out.print(safe(f"{name}: {ended}at {since}, {at}{said}."), markup=False)
    rows = [
        [f["words"], _share(f["share"]), _share(f["champion_share"]), f["requests"], f"{f['evidence']:.3g}"]
        for f in now["findings"]
    ]
    if rows:
        _table((f"of {name}'s answers", "share", f"version {now['champion']}'s", "of", "evidence"), rows)
        needed = 1 / now["plan"]["alpha"]
        out.print(
            f"It is taken back when the evidence of one of these, and the mean of all, reaches {needed:g}; 1 is none."
        )


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.3g} %"


@click.command()
@click.argument("target", metavar="MODEL:N | MODEL --stop")
@_stop
@_why
@_expect
@json_option
def shadow(target: str, stop: bool, reason: str, expect_generation: int | None, as_json: bool) -> None:
    """Send a version copies of the traffic, which it answers to nobody; or take it off again."""
    if stop:
        _stop_slot(target, "shadow", reason, expect_generation, as_json)
        return
    model, number = parse_version(target)
    change = desk().shadow(model, number, reason=reason, expect=expect_generation)
    _told(change, f"{model}:{number} gets copies of the traffic", as_json)


@click.command()
@click.argument("model")
@click.option("--at", "at", help="What served then, such as 2026-11-23T14:00:00Z (UTC unless it says otherwise).")
@json_option
def history(model: str, at: str | None, as_json: bool) -> None:
    """Who changed what serves, when and why; with --at, what served at a time."""
    found = desk().history(model, parse_time(at) if at else None)
    if as_json:
        print_json(found)
        return
    rows = [
        (e["generation"], _time(e["at"]), e["actor"], _action(e), e["slot"], e["from"], e["to"], e["reason"])
        for e in found["entries"]
    ]
    if rows:
        _table(("generation", "at", "actor", "action", "slot", "from", "to", "reason"), rows)
    if at:
        then = found["serving"]
        served = f"version {then['champion']}" if then["champion"] else "no version"
        beside = [f"{slot} {then[slot]}" for slot in ("challenger", "shadow") if then[slot]]
        out.print(f"At {_time(found['at'])} {served} served{', with ' + ', '.join(beside) if beside else ''}.")
    elif not rows:
        out.print(f"Nothing ever served {model}. Promote a version: tunesmith promote {model}:N --reason TEXT")


def parse_time(text: str) -> datetime:
    """An RFC 3339 time or a date, in UTC unless it says otherwise. Raises UsageError."""
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UsageError(f"{text[:40]!a} is not a time.", hint="Write 2026-11-23T14:00:00Z.") from error
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _stop_slot(target: str, slot: Any, reason: str, expected: int | None, as_json: bool) -> None:
    if ":" in target:
        raise UsageError("--stop takes the model's name alone.", hint=f"Write {target.partition(':')[0]} --stop.")
    change = desk().stop(check_model_name(target), slot, reason=reason, expect=expected)
    _told(change, f"{target} has no {slot}", as_json)


def _told(change: dict[str, Any], sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(change)
        return
    already = "" if change["changed"] else " already"
    forced = ", its gate overridden" if change["entry"] and change["entry"]["forced"] else ""
    out.print(f"{sentence}{already} (generation {change['generation']}{forced}).", markup=False)


def _action(entry: dict[str, Any]) -> str:
    share = f" {100 * entry['share']:.4g} %" if entry["share"] is not None else ""
    return str(entry["action"]) + share + (" (forced)" if entry["forced"] else "")


def _estimate(value: dict[str, Any] | None) -> str | None:
    if value is None or value["estimate"] is None:
        return None
    low, high = ("?" if end is None else f"{end:.4g}" for end in (value["low"], value["high"]))
    return f"{value['estimate']:.4g} [{low}, {high}]"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _time(value: datetime | str) -> str:
    time = datetime.fromisoformat(value) if isinstance(value, str) else value  # JSON has no times
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal; elsewhere plain columns, one row a line, as other programs like them."""
    cells = [[_cell(value) for value in row] for row in rows]
    if out.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in columns:
            table.add_column(column)
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        out.print(table)
        return
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    for line in [list(columns), *cells]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else safe(str(value))
