"""The guard: a small process beside the supervisor that ends what is left of a stack when the supervisor is gone,
however it went. Its standard input is a pipe that the supervisor alone holds open.

    python -m infra.guard HOME MARK
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from infra import postgres, processes


def start(home: Path, mark: str) -> subprocess.Popen[bytes]:
    """Start the guard of this process; closing its `stdin` makes it sweep and end."""
    env = {name: value for name, value in os.environ.items() if name != processes.MARK}
    return subprocess.Popen(
        [sys.executable, "-m", "infra.guard", str(home), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for the supervisor
        env=env | {"PYTHONSAFEPATH": "1"},
        cwd=home,
    )


def sweep(home: Path, mark: str) -> None:
    """End every process of the stack with this mark, the embedded PostgreSQL last."""
    processes.end(processes.marked(mark))
    postgres.end_leftover(home / "postgres" / "data")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the supervisor closed the pipe, or died
    sweep(Path(sys.argv[1]), sys.argv[2])
