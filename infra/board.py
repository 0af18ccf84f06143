"""What `tunesmith up` shows: a live table on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from infra.console import err, safe

_STYLE = {"ready": "green", "external": "green", "starting": "yellow", "restarting": "red", "stopped": "dim"}


class Board:
    """Give `show` a supervisor's reports; the table is live until the stack is ready, then only news are printed."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if err.is_terminal:
            self._live = Live(self._table(), console=err, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_live()

    def show(self, report: dict[str, Any]) -> None:
        match report["kind"]:
            case "service":
                self._rows[report["name"]] = report
                if self._live is not None:
                    self._live.update(self._table())
                else:
                    url, message = report["url"] or "", safe(report["message"])
                    err.print(Text(f"{report['name']:<16} {report['state']:<11} {url} {message}".rstrip()))
            case "note":
                err.print(Text(safe(report["text"])))
            case "ready":
                self._end_live()
                err.print(f"Ready after {report['seconds']} s.")

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in self._rows.values():
            state = Text(row["state"], style=_STYLE.get(row["state"], ""))
            table.add_row(row["name"], state, row["url"] or "", Text(safe(row["message"]), style="dim"))
        return table
