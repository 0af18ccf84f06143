"""Commands on what was recorded: corrections come in, tables go out, and a person's text goes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from infra.console import err, json_option, out, print_json, safe

if TYPE_CHECKING:
    from monitoring.feedback import Item, Rejected

_CHUNK = 500


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def feedback(model: str, file: Path, as_json: bool) -> None:
    """Send corrections in bulk: JSON lines with request_id and score, label or correction.

    Lines that are wrong are named and, while they are at most one in twenty, left out; else nothing is taken.
    """
    from infra.db import transaction
    from infra.errors import UsageError
    from monitoring import feedback as kept
    from registry import deployments
    from registry.desk import only_here
    from registry.names import check_model_name

    only_here("feedback")
    check_model_name(model)
    with transaction() as conn:
        deployments.read(conn, model)
    bad = [entry for _, entry in kept.read_lines(file) if isinstance(entry, kept.Rejected)]
    lines = sum(1 for _ in kept.read_lines(file))
    if len(bad) > kept.MAX_REJECTED * lines:
        raise UsageError(
            f"{file.name}: {len(bad)} of {lines} lines are not feedback, so nothing was taken: "
            + "; ".join(f"line {b.line}: {b.reason}" for b in bad[:10]),
            hint='A line is such as {"request_id": "...", "score": -1, "correction": "..."}.',
            details={"rejected": [vars(b) for b in bad[:1000]]},
        )
    if not lines:
        raise UsageError(f"{file.name} is empty, so nothing was taken.", hint="Write one JSON object a line.")
    accepted = 0
    for chunk in _chunks(kept.read_lines(file)):
        taken, refused = _record(model, chunk)
        accepted += taken
        bad += refused
    rejected_lines = [vars(b) for b in sorted(bad, key=lambda b: b.line)]
    if not accepted:
        raise UsageError(
            f"{file.name}: none of its {lines} lines was taken: "
            + "; ".join(f"line {b['line']}: {b['reason']}" for b in rejected_lines[:10]),
            hint="Give ids of requests that this model answered.",
            details={"rejected": rejected_lines[:1000]},
        )
    result = {"model": model, "accepted": accepted, "rejected": rejected_lines}
    for rejected in rejected_lines:
        err.print(f"{safe(file.name)}:{rejected['line']}: {safe(rejected['reason'])}", markup=False)
    if as_json:
        print_json(result)
    else:
        out.print(f"{accepted} accepted, {len(bad)} rejected")


def _chunks(lines: Iterator[tuple[int, Item | Rejected]]) -> Iterator[list[tuple[int, Item]]]:
    from monitoring.feedback import Item

    chunk: list[tuple[int, Item]] = []
    for number, entry in lines:
        if isinstance(entry, Item):
            chunk.append((number, entry))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _record(model: str, chunk: list[tuple[int, Item]]) -> tuple[int, list[Rejected]]:
    """Keep a chunk in one transaction; when a line of it cannot be kept, line by line."""
    from infra.db import transaction
    from infra.errors import NotFound, UsageError
    from monitoring import feedback as kept

    try:
        with transaction() as conn:
            kept.record(conn, [item for _, item in chunk], model=model)
    except (NotFound, UsageError) as error:
        if len(chunk) == 1:
            return 0, [kept.Rejected(line=chunk[0][0], reason=error.message)]
        parts = [_record(model, [entry]) for entry in chunk]
        return sum(taken for taken, _ in parts), [rejected for _, refused in parts for rejected in refused]
    return len(chunk), []


@click.command()
@click.argument("user")
@click.option("--reason", required=True, help="Why, such as the request's number; it stays on record. No names.")
@json_option
def erase(user: str, reason: str, as_json: bool) -> None:
    """Erase the text of all requests that named this USER, and what was said about their answers."""
    from infra.db import transaction
    from monitoring import erasure
    from registry import deployments
    from registry.desk import only_here

    only_here("erase")
    with transaction() as conn:
        done = erasure.erase(conn, user, actor=deployments.actor_here(), reason=reason)
    if as_json:
        print_json(done)
        return
    out.print(f"Erased the text of {done['events']} requests and of {done['feedback']} pieces of feedback.")
    if done["datasets"]:
        names = ", ".join(f"{v['model']}:{v['version']} ({v['how']})" for v in done["versions"]) or "no version"
        places = sorted({place["digest"] for place in done["datasets"]})
        out.print(safe(f"Corrections of theirs are rows of {', '.join(places)}; {names} saw them."), markup=False)
        out.print("Train again without them, then `tunesmith delete` those versions.")


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--since", help="Only rows from then on: a duration, or a time (RFC 3339).")
@click.option("--until", help="Only rows until then.")
@json_option
def table(name: str, file: Path, since: str | None, until: str | None, as_json: bool) -> None:
    """Write the table NAME to FILE, whose ending says how: .csv or .parquet.

    There are requests, windows, feedback, verdicts, alerts, ledger, versions, approvals, runs, studies, trials, and
    keys (what each used, by day).
    """
    from infra.db import transaction
    from infra.durations import parse_time
    from monitoring import tables

    end = parse_time("--until", until) if until else None
    begin = parse_time("--since", since, before=end or datetime.now(UTC)) if since else None
    with transaction() as conn:
        count = tables.write(conn, name, file, since=begin, until=end)
    if as_json:
        print_json({"table": name, "file": str(file), "rows": count})
    else:
        out.print(safe(f"{count} rows of {name} in {file}"), markup=False)
