"""How commands speak: results on standard output (text, or one JSON object with ``--json``), all else on
standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import orjson
from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

# A pipe has no width: there, a table is as wide as it needs
out = Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def json_option(function: F) -> F:
    """Adds ``--json``, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(function)


def print_json(value: Any) -> None:
    """One JSON object on standard output; times are RFC 3339 UTC, NaN becomes null."""
    text = orjson.dumps(
        value,
        option=orjson.OPT_INDENT_2 | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z | orjson.OPT_SERIALIZE_NUMPY,
        default=str,
    ).decode()
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def safe(text: str) -> str:
    """Text of a user's, made harmless for a terminal: control and direction characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
