"""A search's workers on this machine: one a core or a GPU, their output in log files, replaced when they die."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

from infra.db import transaction
from infra.errors import TunesmithError
from infra.settings import get_settings
from pipelines.tuning import devices
from pipelines.tuning.worker import ALLOCATOR, MARK, SHARING, name_of
from registry import studies


class Crew:
    """`wanted` worker processes of a study. Not thread-safe."""

    def __init__(self, study: str, wanted: int) -> None:
        self.study, self.wanted = study, wanted
        self.mark = secrets.token_hex(4)  # in its workers' names
        self.places: dict[int, subprocess.Popen[bytes]] = {}  # number of the log file -> process
        self.deaths = 0  # since a job was last done or failed

    def muster(self) -> None:
        """Start workers for the places that are free."""
        for place in range(1, self.wanted + 1):
            if place not in self.places:
                self.places[place] = self._start(place)

    def bury(self) -> None:
        """Free the jobs of workers that died at once. Raises TunesmithError when workers die without end."""
        for place, process in list(self.places.items()):
            code = process.poll()
            if code is None:
                continue
            with transaction() as conn:
                studies.bury(conn, self.study, name_of(self.mark, process.pid))
            del self.places[place]
            if code == 0:  # it saw the study stop
                continue
            self.deaths += 1
            if self.deaths > 2 * self.wanted + 2:
                words = _last_line(self._log(place))
                raise TunesmithError(
                    f"Search workers died {self.deaths} times in a row, the last with code {code}"
                    + (f": {words}" if words else "."),
                    hint=f"See {self._log(place)}.",
                )

    def progressed(self) -> None:
        """A job came to its end, so that workers do not die of what they all have in common."""
        self.deaths = 0

    def dismiss(self) -> None:
        """End all workers; what they were at waits again, for that was not their fault."""
        alive = [process for process in self.places.values() if process.poll() is None]
        for process in alive:
            process.terminate()
        for process in self.places.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # When the database is away, their leases run out by themselves
            with contextlib.suppress(TunesmithError), transaction() as conn:
                leave = studies.give_back if process in alive else studies.bury
                leave(conn, self.study, name_of(self.mark, process.pid))
        self.places.clear()

    def surroundings(self, place: int) -> dict[str, str]:
        """The environment of a worker, which says how many share its device, or this machine."""
        environment = ALLOCATOR | os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            MARK: self.mark,
            SHARING: str(self.wanted),
        }  # fmt: skip
        if gpus := devices.gpus():
            mine = (place - 1) % len(gpus)
            environment["CUDA_VISIBLE_DEVICES"] = gpus[mine]
            environment[SHARING] = str(len(range(mine, self.wanted, len(gpus))))
        return environment

    def _start(self, place: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipelines.tuning.worker", self.study, str(os.getpid())]
        path = self._log(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            # Their own group: Ctrl-C is the coordinator's to handle
            return subprocess.Popen(
                command, env=self.surroundings(place), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def _log(self, place: int) -> Path:
        return get_settings().home / "logs" / f"worker-{place}.log"


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
    return ""
