"""A YAML 1.2 file as plain values that know their line, with overrides from the command line.

The file is composed into nodes and walked here, rather than constructed by the library, so that every duplicate
key is found, every value keeps its line, and no tag of the file's can make an object.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import ConfigError

Field = tuple[str | int, ...]
_LONGEST = 1000  # digits of a number; a longer one stays a text, which no setting takes
_MOST_BYTES = 1_000_000
_MOST_VALUES = 100_000  # aliases of aliases make a small file a huge tree


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with one field, and what to do: ``pipeline.yaml:7: tuning.trials: ...``."""

    where: str
    field: Field
    message: str
    line: int = 0

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, dotted(self.field), self.message) if part)


@dataclass(kw_only=True)
class Source:
    """The values of a file, and where each came from: ``file:line``, or ``--set name``."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Field, tuple[str, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    seen: int = 0

    def problem(self, at: Field, message: str) -> Problem:
        """A problem at a field, or at the nearest one around it that the file has."""
        near = at
        while near and near not in self.places:
            near = near[:-1]
        where, line = self.places.get(near, (str(self.path), 0))
        return Problem(where=where, field=at, message=message, line=line)


def dotted(at: Field) -> str:
    """``("gates", 0, "metric")`` as ``gates[0].metric``."""
    names = [part if isinstance(part, int) or part.isprintable() else ascii(part) for part in at]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)
    return text.removeprefix(".")


def failure(path: Path, problems: Sequence[Problem]) -> ConfigError:
    """One error for all problems, in the file's order."""
    ordered = sorted(problems, key=lambda p: p.line)
    count = "one problem" if len(ordered) == 1 else f"{len(ordered)} problems"
    return ConfigError(
        f"{count} in {path}\n" + "\n".join(f"  {problem}" for problem in ordered),
        hint="See pipelines/examples/support.yaml for every setting, with its meaning.",
        details={
            "problems": [
                {"where": p.where, "line": p.line, "field": dotted(p.field), "message": p.message} for p in ordered
            ]
        },
    )


def read(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Read a file and lay the overrides (``tuning.trials=4``) over it.

    Raises ConfigError when it is no readable YAML mapping; duplicate keys and wrong overrides are kept in
    `problems`, to be told together with what else is wrong.
    """
    source = Source(path=path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror or error}.", hint="Give the path of a pipeline file with -c."
        ) from error
    if len(raw) > _MOST_BYTES:
        raise ConfigError(f"{path}: has {len(raw):,} bytes; a pipeline file is shorter than {_MOST_BYTES:,}.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise failure(path, [_syntax(path, line, "is not UTF-8; save the file in UTF-8")]) from error
    try:
        from ruamel.yaml.error import YAMLError

        node = _compose(text)
    except (YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise failure(
            path, [_syntax(path, line, f"is not YAML: {what}; mend the file there, or just above")]
        ) from error
    if node is None or node.id != "mapping":
        raise failure(path, [_syntax(path, 1, "holds no settings; it must be a mapping such as `model: my-model`")])
    source.values = _build(source, node, (), lambda line: (f"{path}:{line}", line))
    for override in overrides:
        _override(source, override)
    return source


def value(text: str) -> Any:
    """One value in YAML, as in ``--set name=value``. Raises ValueError when it is no YAML."""
    from ruamel.yaml.error import YAMLError

    try:
        node = _compose(text)
    except (YAMLError, RecursionError) as error:
        raise ValueError(f"the value {text!r} is not YAML; quote it") from error
    return None if node is None else _build(Source(path=Path("--set")), node, (), lambda line: ("", 0))


def _syntax(path: Path, line: int, message: str) -> Problem:
    return Problem(where=f"{path}:{line}" if line else str(path), field=(), message=message, line=line)


def _compose(text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).compose(text)


def _build(source: Source, node: Any, at: Field, place: Any, above: tuple[int, ...] = ()) -> Any:
    source.seen += 1
    if id(node) in above or source.seen > _MOST_VALUES:
        if source.seen <= _MOST_VALUES + 1:
            source.problems.append(source.problem(at, "refers to itself, or to too much; write the values out"))
            source.seen = _MOST_VALUES + 1
        return None
    above = (*above, id(node))
    if node.id == "sequence":
        items = []
        for index, child in enumerate(node.value):
            source.places[(*at, index)] = place(child.start_mark.line + 1)
            items.append(_build(source, child, (*at, index), place, above))
        return items
    if node.id == "mapping":
        values: dict[str, Any] = {}
        for key_node, child in node.value:
            key, line = str(key_node.value) if key_node.id == "scalar" else "?", key_node.start_mark.line + 1
            if key in values:
                first = source.places[(*at, key)][1]
                where, _ = place(line)
                message = f"stands twice, first in line {first}; keep one of them"
                source.problems.append(Problem(where=where, field=(*at, key), message=message, line=line))
                continue
            source.places[(*at, key)] = place(line)
            values[key] = _build(source, child, (*at, key), place, above)
        return values
    return _scalar(node)


def _scalar(node: Any) -> Any:
    """YAML 1.2's core schema: null, booleans true and false, decimal, octal and hexadecimal numbers; else text."""
    text, kind = str(node.value), node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and re.fullmatch(r"[-+]?\d+|0o[0-7]+|0x[0-9a-fA-F]+", text) and len(text) <= _LONGEST:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    if kind == "float" and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    if kind == "float" and re.fullmatch(r"[-+]?\.(inf|nan)", text.lower()):
        return float(text.lower().replace(".", ""))
    return text


def _override(source: Source, override: str) -> None:
    name, equals, text = override.partition("=")
    at: Field = tuple(int(part) if part.isascii() and part.isdigit() else part for part in name.strip().split("."))
    label = f"--set {name.strip()}"
    where = (label, 0)

    def wrong(message: str) -> None:
        source.problems.append(Problem(where=label, field=(), message=message))

    if not equals or not all(str(part) for part in at):
        wrong("is not of the form name=value; write it as --set tuning.trials=4")
        return
    try:
        from ruamel.yaml.error import YAMLError

        node = _compose(text)
    except (YAMLError, RecursionError):
        wrong(f"the value {text[:200]!r} is not YAML; quote it")
        return
    for stale in [place for place in source.places if place[: len(at)] == at]:
        del source.places[stale]
    value = None if node is None else _build(source, node, at, lambda line: where)
    target: Any = source.values
    for part in at[:-1]:
        if isinstance(target, dict) and isinstance(part, str):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        elif isinstance(target, list) and isinstance(part, int) and part < len(target):
            target = target[part]
        else:
            target = None
    last = at[-1]
    keyed = isinstance(target, dict) and isinstance(last, str)
    if not keyed and not (isinstance(target, list) and isinstance(last, int) and last < len(target)):
        wrong("names no place in the file; lists are addressed by number, as in --set gates.0.margin=0.1")
        return
    target[last] = value
    source.places[at] = where
