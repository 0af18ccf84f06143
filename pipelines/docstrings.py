"""Real text that is always there: (signature, first docstring line) pairs of installed Python packages.

The demo's data. Nothing is downloaded, and each package is a naturally different distribution.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# Importing these has effects a reader of documentation does not want: windows, prints, threads, test code.
_SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "turtledemo", "turtle", "test", "tkinter", "msilib"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One function or class: its qualified signature, and the first line of its documentation."""

    module: str
    signature: str
    summary: str


def standard_library() -> list[Pair]:
    """Pairs of the standard library's public modules, in a stable order; some 4,000 after repeats are dropped."""
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in _SKIPPED)
    with _unwarned():
        return _unique(pair for name in names for module in _modules(name) for pair in _pairs(module))


def packages(*names: str) -> list[Pair]:
    """Pairs of the public names of the given modules themselves, such as ``numpy`` or ``torch.nn.functional``."""
    with _unwarned():
        return _unique(pair for name in names if (module := _load(name)) for pair in _pairs(module, own=False))


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Reading a deprecated name's documentation is no use of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _modules(name: str) -> Iterator[ModuleType]:
    module = _load(name)
    if module is None:
        return
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not info.name.startswith("_") and info.name not in _SKIPPED | {"tests", "__main__"}:
            child = _load(f"{name}.{info.name}")
            if child is not None:
                yield child


def _load(name: str) -> ModuleType | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(name)
    except (Exception, SystemExit):  # a module of another platform, or one whose optional part is missing
        return None


def _pairs(module: ModuleType, *, own: bool = True) -> Iterator[Pair]:
    for name in sorted(n for n in dir(module) if not n.startswith("_")):
        thing = getattr(module, name, None)
        if not callable(thing) or (own and getattr(thing, "__module__", None) != module.__name__):
            continue
        yield from _pair(module, f"{module.__name__}.{name}", thing)
        if own and inspect.isclass(thing):
            for attribute in sorted(n for n in vars(thing) if not n.startswith("_")):
                method = inspect.getattr_static(thing, attribute)
                method = getattr(method, "__func__", method)
                if callable(method):
                    yield from _pair(module, f"{module.__name__}.{name}.{attribute}", method)


def _pair(module: ModuleType, name: str, thing: Any) -> Iterator[Pair]:
    doc = getattr(thing, "__doc__", None)
    if not isinstance(doc, str):
        return
    lines = [line.strip() for line in doc.strip().splitlines()]
    # numpy's compiled functions open with their own signature
    if lines and re.match(r"[\w.]+\(.*\)(\s*->.*)?$", lines[0]):
        head = re.sub(r"^[\w.]*?(\w+)\(", r"\1(", lines[0])
        arguments = head[head.index("(") :].split("->")[0].strip()
        lines = [line for line in lines[1:] if line]
    else:
        try:
            arguments = str(inspect.signature(thing)).split(" -> ")[0]
        except (ValueError, TypeError):
            return
    arguments = re.sub(r" at 0x[0-9a-f]+", "", arguments)
    paragraph: list[str] = []
    for line in lines:
        if not line:
            break
        paragraph.append(line)
    summary = re.split(r"(?<=[.!?])\s", " ".join(paragraph), maxsplit=1)[0]
    if 12 <= len(summary) <= 160 and len(arguments) <= 200 and summary.isascii() and " " in summary:
        yield Pair(module=module.__name__, signature=name + arguments, summary=summary)


def _unique(pairs: Iterator[Pair]) -> list[Pair]:
    """The first of each summary: inherited documentation repeats, and a repeated answer teaches nothing."""
    seen: set[str] = set()
    kept = []
    for pair in pairs:
        if pair.summary.lower() not in seen:
            seen.add(pair.summary.lower())
            kept.append(pair)
    return kept
