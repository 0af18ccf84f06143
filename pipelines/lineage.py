"""`tunesmith lineage`: what a version was made of, and which versions saw a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from infra.console import json_option, out, print_json, safe
from infra.errors import NotFound, UsageError
from registry.desk import desk
from registry.lineage import check_row_id
from registry.names import parse_ref


@click.command()
@click.argument("version", required=False)
@click.option("--row", metavar="FILE:LINE|ID", help="A line of a data file, or a row's id: which versions saw it?")
@json_option
def lineage(version: str | None, row: str | None, as_json: bool) -> None:
    """What MODEL:N was made of; or, with --row, which data sets hold a row and which versions saw it."""
    if (version is None) == (row is None):
        raise UsageError("Name either a version or a row.", hint="`tunesmith lineage MODEL:N`, or --row FILE:LINE.")
    if version is not None:
        found = desk().lineage(parse_ref(version))
        print_json(found) if as_json else _show_version(found)
        return
    found = desk().row(row_ids(row or ""))
    print_json(found) if as_json else _show_row(found)


def row_ids(text: str) -> list[str]:
    """The ids that a row may have in data sets: as it stands in the file, and with personal data redacted.

    Raises NotFound for no such file or line, UsageError for a line that is no row.
    """
    file, colon, line = text.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not line.isdigit() or not path.is_file():
        return [check_row_id(text)]
    from pipelines.data import quality, sources

    for read in sources.read(path):
        if read.line < int(line):
            continue
        if read.line > int(line):
            break
        if isinstance(read, sources.Bad):
            raise UsageError(f"{path}:{line} is no row: {read.reason}.", hint="Such rows are in no data set.")
        ids = []
        for pii in ("keep", "redact"):
            kept = quality.Screened()
            quality.screen(kept, read.messages, pii=pii, source="train")
            ids += [row.id for row in kept.rows]
        return list(dict.fromkeys(ids))
    raise NotFound(f"No row begins at line {line} of {path}.", hint="Blank lines and a CSV's header are no rows.")


def _show_version(found: dict[str, Any]) -> None:
    base, dataset, began = found["base"], found["dataset"], found["began_from"]
    _line("version", f"{found['model']}:{found['version']} ({found['bundle']})")
    _line("base", f"{base['id']} at {base['revision']} ({base['digest']})")
    if dataset:
        _line("data set", dataset["digest"] + ("" if dataset["here"] else ", not in this store"))
        counts = {name: count for name, count in (dataset.get("counts") or {}).items() if count}
        _line("rows", ", ".join(f"{count} {name}" for name, count in counts.items()))
        for source in dataset.get("sources") or []:
            licence = source.get("licence") or "licence not stated"
            _line("source", f"{source['path']} ({source['digest']}), {licence}")
        _line("made from", dataset.get("parent"))
    _line("began from", began and f"{', '.join(began['versions']) or 'a bundle'} ({began['bundle']})")
    _line("study", found["study"] and f"{found['study']}, trial {found['trial']}")
    _line("params", ", ".join(f"{name} {value}" for name, value in found["params"].items()))
    _line("code", found["code_version"])
    _line("environment", found["environment"] and f"environment.json ({found['environment']})")
    _line("run", found["run_id"])


def _show_row(found: dict[str, Any]) -> None:
    if not found["datasets"]:
        out.print("No data set here holds this row; near-duplicates that were dropped are not kept.")
        return
    for place in found["datasets"]:
        _line(place["model"], f"{place['split']}.jsonl:{place['line']} of {place['digest']}")
    if not found["versions"]:
        out.print("No version was made with them.")
    for version in found["versions"]:
        serving = f", {version['serving']} now" if version["serving"] else ""
        _line(f"{version['model']}:{version['version']}", version["how"] + serving)


def _line(name: str, value: Any) -> None:
    if value:
        out.print(safe(f"{name:<12} {value}"), markup=False)
