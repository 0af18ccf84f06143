"""What benchmarks stand on: a home and an embedded PostgreSQL of their own, gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from infra import migrate, postgres, processes
from infra.settings import get_settings


class Home(NamedTuple):
    folder: Path
    database_port: int


@contextmanager
def temporary_home() -> Iterator[Home]:
    """An empty, migrated home, by this process's environment and its children's; no setting of the caller's holds."""
    for name in [n for n in os.environ if n.startswith(("TUNESMITH_", "MLFLOW_", "PREFECT_", "PG"))]:
        del os.environ[name]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands are measured as users have them: compiled once
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-bench-"))
    folder.chmod(0o755)  # as root PostgreSQL runs as another user
    os.environ |= {
        "TUNESMITH_HOME": str(folder), "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    try:
        with postgres.running(folder) as (cluster, port):
            os.environ["TUNESMITH_DATABASE_URL"] = cluster.url(port)
            get_settings.cache_clear()
            migrate.create_databases(get_settings())
            migrate.migrate(get_settings().database())
            yield Home(folder, port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started(
    start: Callable[[], subprocess.Popen[bytes]], ready: Callable[[], bool], name: str, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, with all that it started, from when it is ready until the end of the block."""
    process = start()
    try:
        until = time.monotonic() + 300
        while not ready():
            if time.monotonic() > until or process.poll() is not None:
                sys.exit(f"{name} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.3)
        yield process
    finally:
        processes.signal_group(process.pid, signal.SIGKILL)
        process.wait()
