"""Commands on versions: models, versions, show, compare, verify, import, export, approve, promote, rollback, canary,
shadow, history."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from infra.console import json_option, out, print_json, safe
from infra.db import transaction
from infra.errors import TunesmithError, Unreachable, UsageError
from registry import deployments
from registry.names import check_model_name, parse_ref, parse_version

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
    from registry import versions as owner

    with transaction() as conn:
        found = owner.list_models(conn)
    if as_json:
        print_json({"models": found})
        return
    if not found:
        out.print("No models yet. Make one: tunesmith run -c FILE, or tunesmith demo.")
        return
    slots = ("champion", "challenger", "shadow")
    rows = [[m["model"], m["versions"], *(m[slot] for slot in slots), m["generation"]] for m in found]
    _table(("model", "versions", *slots, "generation"), rows)


@click.command()
@click.argument("model")
@json_option
def versions(model: str, as_json: bool) -> None:
    """List a model's versions."""
    from registry import versions as owner

    with transaction() as conn:
        found = owner.list_versions(conn, model)
        now = deployments.read(conn, model)
    if as_json:
        print_json({"model": model, "versions": [v.to_json(now.slot_of(v.number)) for v in found]})
        return
    if not found:
        out.print(f"{model} has no versions yet.")
        return
    names = sorted({name for v in found for name in v.metrics})
    rows = [
        [v.number, _time(v.created_at), now.slot_of(v.number), v.decision, v.base, v.method]
        + [v.metrics.get(name) for name in names]
        for v in found
    ]
    _table(("version", "created", "serving", "gate", "base", "method", *names), rows)


@click.command()
@click.argument("version")
@json_option
def show(version: str, as_json: bool) -> None:
    """Show one version: MODEL:N, MODEL@SLOT, or MODEL for its champion."""
    from registry import approvals, mlflow
    from registry import versions as owner

    with transaction() as conn:
        found = owner.find(conn, parse_ref(version))
        agreed = approvals.of(conn, found.model, found.number)
        serving = deployments.read(conn, found.model).slot_of(found.number)
        evaluation, gate = owner.evidence(conn, found.evaluation), owner.evidence(conn, found.gate)
    try:
        page = mlflow.version_url(found.model, found.number)
    except Unreachable:
        page = None
    facts: dict[str, Any] = {
        "model": found.model,
        "version": found.number,
        "created_at": found.created_at.astimezone(UTC),
        "serving": serving,
        "method": found.method,
        "base": found.manifest["base"],
        "prompt": found.manifest["prompt"],
        "generation": found.manifest["generation"],
        "dataset": found.manifest["dataset"],
        "study": found.study,
        "trial": found.manifest["trial"],
        "params": found.manifest["params"],
        "code_version": found.manifest["code_version"],
        "bundle": found.bundle_digest,
        "run_id": found.run_id,
        "mlflow_run_id": found.mlflow_run_id,
        "mlflow_url": page,
        "metrics": found.metrics,
        "gate": gate and {"decision": gate["decision"], "reasons": gate["reasons"], "evidence": found.gate},
        "approvals": agreed.to_json(),
        "evaluation": evaluation and {k: evaluation[k] for k in ("metrics", "slices", "rows") if k in evaluation},
    }
    if as_json:
        print_json(facts)
        return
    flat = {**facts, "base": f"{facts['base']['id']} ({facts['base']['digest']})"}
    flat |= {"prompt": facts["prompt"]["system"], "created_at": _time(found.created_at)}
    flat |= {"gate": gate["decision"] if gate else "never judged"}
    for name in ("generation", "params"):
        flat[name] = ", ".join(f"{key} {value}" for key, value in facts[name].items())
    for name in ("metrics", "evaluation", "approvals"):
        del flat[name]
    _table(("", found.name), [[key, value] for key, value in flat.items() if value is not None])
    if evaluation:
        columns = ("candidate", "base", "champion", "vs_base", "vs_champion")
        rows = [[name, *(_estimate(m.get(c)) for c in columns)] for name, m in evaluation["metrics"].items()]
        _table((f"on {evaluation['rows']} test rows", *(c.replace("_", " ") for c in columns)), rows)
    for reason in gate["reasons"] if gate else []:
        out.print(safe(f"gate: {reason}"), markup=False)
    for given in agreed.given:
        line = f"approved by {given.actor} ({given.role}) at {_time(given.at)}: {given.reason}"
        out.print(safe(line), markup=False)
    if agreed.missing:
        out.print(safe(f"not to be promoted yet: {agreed.outstanding()}"), markup=False)


_TIMED = ("p95_latency_ms", "tokens_per_second")


@click.command()
@click.argument("first")
@click.argument("second")
@json_option
def compare(first: str, second: str, as_json: bool) -> None:
    """Compare two versions by their own evaluations, side by side."""
    from registry import versions as owner

    with transaction() as conn:
        a, b = (owner.find(conn, parse_ref(text)) for text in (first, second))
        evaluated = [owner.evidence(conn, version.evaluation) or {"metrics": {}} for version in (a, b)]
    left, right = (evaluation["metrics"] for evaluation in evaluated)
    metrics = {}
    for name in sorted(left.keys() | right.keys()):
        pair = [side.get(name, {}).get("candidate") for side in (left, right)]
        # Speed was measured at other times, beside other work: it is compared within one evaluation only
        better = None if name in _TIMED else _better(pair[0], pair[1])
        metrics[name] = {"a": pair[0], "b": pair[1], "better": better}
    differences = {
        key: {"a": a.manifest[key], "b": b.manifest[key]}
        for key in ("base", "prompt", "generation", "dataset", "method", "study", "params", "code_version")
        if a.manifest[key] != b.manifest[key]
    }
    same_rows = a.dataset_digest is not None and a.dataset_digest == b.dataset_digest
    if as_json:
        print_json({"a": a.name, "b": b.name, "metrics": metrics, "differences": differences, "same_rows": same_rows})
        return
    rows = [[name, _estimate(m["a"]), _estimate(m["b"]), m["better"] or "not clear"] for name, m in metrics.items()]
    _table(("metric", f"a: {a.name}", f"b: {b.name}", "clearly better"), rows)
    for key, sides in differences.items():
        out.print(safe(f"{key}: {_short(sides['a'])} -> {_short(sides['b'])}"), markup=False)
    if not same_rows:
        out.print("The two were not judged on the test rows of one data set.")


@click.command()
@click.argument("version")
@json_option
def verify(version: str, as_json: bool) -> None:
    """Check a version's files, evidence, MLflow copy and base, and the ledger's chain. Exit 1: something is wrong."""
    from registry.verification import verify_version

    model, number = parse_version(version)
    checks = verify_version(model, number)
    states = {check.state for check in checks}
    if as_json:
        listed = [check.to_json() for check in checks]
        print_json({"model": model, "version": number, "ok": "failed" not in states, "checks": listed})
    else:
        _table(("check", "state", "detail"), [[c.name, c.state, c.detail] for c in checks])
    if "failed" in states:
        raise click.exceptions.Exit(TunesmithError.exit_code)
    if "unreachable" in states:
        raise click.exceptions.Exit(Unreachable.exit_code)


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The model it becomes a version of.")
@click.option("--base", help="The base, when the adapter's config does not name it well.")
@json_option
def import_(path: Path, model: str, base: str | None, as_json: bool) -> None:
    """Bring in a PEFT adapter's folder, or an exported version, as the model's next version."""
    from registry.exchange import import_version

    made = import_version(path, model, base=base)
    result = {"model": made.model, "version": made.number, "method": made.method, "bundle": made.bundle_digest}
    if as_json:
        print_json(result)
    else:
        out.print(f"{made.name} is registered ({made.method}, {made.bundle_digest}).", markup=False)


@click.command()
@click.argument("version")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def export(version: str, path: Path, as_json: bool) -> None:
    """Write a version's files to a new folder; its adapter/ loads in PEFT and vLLM as it is (DoRA in PEFT alone)."""
    from registry import versions as owner
    from registry.exchange import export_version

    with transaction() as conn:
        found = owner.find(conn, parse_ref(version))
    export_version(found, path)
    if as_json:
        print_json(
            {"model": found.model, "version": found.number, "path": str(path.absolute()), "bundle": found.bundle_digest}
        )
    else:
        out.print(f"{found.name} is in {path}.", markup=False)


@click.command()
@click.argument("version")
@_reason
@_expect
@_force
@json_option
def promote(version: str, reason: str, expect_generation: int | None, force: bool, as_json: bool) -> None:
    """Make MODEL:N serve. Exit 3: its gate refuses; 4: someone changed the deployment first."""
    model, number = parse_version(version)
    with transaction() as conn:
        change = deployments.promote(
            conn,
            model,
            number,
            actor=deployments.actor_here(),
            reason=reason,
            expect_generation=expect_generation,
            force=force,
        )
    _told(change, f"{model}:{number} serves", as_json)


@click.command()
@click.argument("version")
@click.option("--reason", required=True, help="Why; it stays on the record.")
@json_option
def approve(version: str, reason: str, as_json: bool) -> None:
    """Agree that MODEL:N may serve, where its pipeline asks for approvals. Exit 3: you are its author."""
    from registry import approvals

    model, number = parse_version(version)
    with transaction() as conn:  # who reaches the database is an admin
        new, now = approvals.approve(conn, model, number, actor=deployments.actor_here(), role="admin", reason=reason)
    if as_json:
        print_json({"model": model, "version": number, "changed": new, **now.to_json()})
        return
    already = "" if new else " already"
    rest = f"; {now.missing} of {now.needed} missing" if now.missing else f", {now.needed} needed"
    out.print(f"You approved of {model}:{number}{already} ({len(now.given)} given{rest}).", markup=False)


@click.command()
@click.argument("model")
@_reason
@click.option("--to", type=click.IntRange(min=1), help="The version to go back to; else the one before.")
@_expect
@json_option
def rollback(model: str, reason: str, to: int | None, expect_generation: int | None, as_json: bool) -> None:
    """Take the last promotion back. Exit 3: nothing served before; 4: someone changed the deployment first."""
    with transaction() as conn:
        change = deployments.rollback(
            conn,
            check_model_name(model),
            actor=deployments.actor_here(),
            reason=reason,
            to=to,
            expect_generation=expect_generation,
        )
    _told(change, f"{model}:{change.deployment.champion} serves", as_json)


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
    actor = deployments.actor_here()
    if stop:
        _stop_slot(target, "challenger", actor, reason, expect_generation, as_json)
        return
    if share is None:
        raise UsageError("A canary needs a share.", hint="Such as --share 10%.")
    model, number = parse_version(target)
    part = parse_share(share)
    with transaction() as conn:
        change = deployments.canary(
            conn,
            model,
            number,
            share=part,
            actor=actor,
            reason=reason,
            expect_generation=expect_generation,
            force=force,
        )
    _told(change, f"{model}:{number} gets {100 * part:.4g} % of the traffic", as_json)


@click.command()
@click.argument("target", metavar="MODEL:N | MODEL --stop")
@_stop
@_why
@_expect
@json_option
def shadow(target: str, stop: bool, reason: str, expect_generation: int | None, as_json: bool) -> None:
    """Send a version copies of the traffic, which it answers to nobody; or take it off again."""
    actor = deployments.actor_here()
    if stop:
        _stop_slot(target, "shadow", actor, reason, expect_generation, as_json)
        return
    model, number = parse_version(target)
    with transaction() as conn:
        change = deployments.shadow(
            conn, model, number, actor=actor, reason=reason, expect_generation=expect_generation
        )
    _told(change, f"{model}:{number} gets copies of the traffic", as_json)


@click.command()
@click.argument("model")
@click.option("--at", "at", help="What served then, such as 2026-11-23T14:00:00Z (UTC unless it says otherwise).")
@json_option
def history(model: str, at: str | None, as_json: bool) -> None:
    """Who changed what serves, when and why; with --at, what served at a time."""
    moment = parse_time(at) if at else None
    with transaction() as conn:
        entries = deployments.history(conn, model, moment)
    then = deployments.replay(model, entries)
    if as_json:
        body: dict[str, Any] = {"model": model, "entries": [entry.to_json() for entry in entries]}
        print_json({**body, "at": moment, "serving": then.to_json()} if moment else body)
        return
    rows = [
        (e.generation, _time(e.at), e.actor, _action(e), e.slot, e.from_version, e.to_version, e.reason)
        for e in entries
    ]
    if rows:
        _table(("generation", "at", "actor", "action", "slot", "from", "to", "reason"), rows)
    if moment:
        served = f"version {then.champion}" if then.champion else "no version"
        beside = [f"{slot} {getattr(then, slot)}" for slot in ("challenger", "shadow") if getattr(then, slot)]
        out.print(f"At {_time(moment)} {served} served{', with ' + ', '.join(beside) if beside else ''}.")
    elif not rows:
        out.print(f"Nothing ever served {model}. Promote a version: tunesmith promote {model}:N --reason TEXT")


def parse_share(text: str) -> float:
    """``10%`` or ``0.1`` as 0.1. Raises UsageError; a bare 1 is refused, since it could mean either 1 % or all."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / 100 if percent else float(number)
    except ValueError:
        share = 0.0
    if rest or not 0 < share <= 1 or (share == 1 and not percent):
        raise UsageError(f"{text[:40]!a} is not a share.", hint="Write 10% or 0.1; all of the traffic is 100%.")
    return share


def parse_time(text: str) -> datetime:
    """An RFC 3339 time or a date, in UTC unless it says otherwise. Raises UsageError."""
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UsageError(f"{text[:40]!a} is not a time.", hint="Write 2026-11-23T14:00:00Z.") from error
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _stop_slot(target: str, slot: Any, actor: str, reason: str, expected: int | None, as_json: bool) -> None:
    if ":" in target:
        raise UsageError("--stop takes the model's name alone.", hint=f"Write {target.partition(':')[0]} --stop.")
    with transaction() as conn:
        change = deployments.stop(
            conn, check_model_name(target), slot, actor=actor, reason=reason, expect_generation=expected
        )
    _told(change, f"{target} has no {slot}", as_json)


def _told(change: deployments.Change, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(change.to_json())
        return
    already = "" if change.changed else " already"
    forced = ", its gate overridden" if change.entry and change.entry.forced else ""
    out.print(f"{sentence}{already} (generation {change.deployment.generation}{forced}).", markup=False)


def _action(entry: deployments.Entry) -> str:
    share = f" {100 * entry.share:.4g} %" if entry.share is not None else ""
    return entry.action + share + (" (forced)" if entry.forced else "")


def _better(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str | None:
    """Whose interval lies wholly on the better side of the other's; a paired test would see smaller differences."""
    if a is None or b is None or None in (a["low"], a["high"], b["low"], b["high"]):
        return None
    if a["low"] > b["high"]:
        return "a" if a["higher_is_better"] else "b"
    if b["low"] > a["high"]:
        return "b" if a["higher_is_better"] else "a"
    return None


def _estimate(value: dict[str, Any] | None) -> str | None:
    if value is None or value["estimate"] is None:
        return None
    low, high = ("?" if end is None else f"{end:.4g}" for end in (value["low"], value["high"]))
    return f"{value['estimate']:.4g} [{low}, {high}]"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _time(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


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
