"""Live progress on standard error: a bar a stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from infra.console import err

_WIDE = 110  # columns from which there is room for a bar beside the words
_PLAIN_EVERY = 5.0  # seconds between plain lines of one stage
_live: Progress | None = None
_tasks: dict[str, TaskID] = {}
_last: dict[str, tuple[float, str]] = {}


@contextmanager
def shown() -> Iterator[None]:
    """Draw what is reported within the block as bars, when standard error is a terminal."""
    global _live
    if not err.is_terminal or _live is not None:
        yield
        return
    words = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, overflow="fold"))
    columns = (
        TextColumn("[bold]{task.fields[stage]:<9}", table_column=Column(no_wrap=True, min_width=9)),
        *([BarColumn(bar_width=24)] if err.width >= _WIDE else []),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=5)),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        words,
    )
    with Progress(*columns, console=err, refresh_per_second=4, expand=True) as progress:
        _live = progress
        _tasks.clear()
        try:
            yield
        finally:
            _live = None


def report(stage: str, text: str, done: float | None = None, total: float | None = None) -> None:
    """Say how far a stage is. `done == total` ends its bar; plain lines are thinned, the last one always shows."""
    finished = total is not None and done is not None and done >= total
    if _live is not None:
        if stage not in _tasks:
            _tasks[stage] = _live.add_task("", stage=stage, total=total)
        _live.update(_tasks[stage], description=text, completed=done, total=total)
        return
    now = time.monotonic()
    then, said = _last.get(stage, (0.0, ""))
    if text != said and (finished or now - then >= _PLAIN_EVERY):
        _last[stage] = (now, text)
        amount = f" {done:g}/{total:g}" if done is not None and total is not None else ""
        sys.stderr.write(Text(f"{stage:<9}{amount} {text}").plain + "\n")
        sys.stderr.flush()
