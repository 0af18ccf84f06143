"""What benchmarks stand on: a home and an embedded PostgreSQL of their own, gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from infra import db, migrate, ports, postgres, processes
from infra.services import sqlalchemy_url
from infra.settings import get_settings
from infra.web import answers

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "integration")]  # some benchmarks stand on what tests do


class Home(NamedTuple):
    folder: Path
    database_port: int


@contextmanager
def temporary_home() -> Iterator[Home]:
    """An empty, migrated home, by this process's environment and its children's; no setting of the caller's holds."""
    for name in [n for n in os.environ if n.startswith(("TUNESMITH_", "MLFLOW_", "PREFECT_", "OTEL_", "PG"))]:
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
        if db.pool.cache_info().currsize:
            db.pool().close()
        db.pool.cache_clear()  # another home has another database
        get_settings.cache_clear()
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


@contextmanager
def gateway(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`tunesmith serve` on a home: its address and process."""
    argv = ["-m", "pipelines.cli", "serve", "--port"]
    with _server(folder, "serve", argv, {}, "/healthz") as served:
        yield served


@contextmanager
def mlflow(folder: Path, *, workers: int = 1) -> Iterator[tuple[str, psutil.Process]]:
    """MLflow's server on the home's database, on uvloop: its address and process."""
    own = {
        "MLFLOW_BACKEND_STORE_URI": sqlalchemy_url(get_settings().database("mlflow"), "psycopg"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    argv = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", str(workers), "--uvicorn-opts"]
    argv += [
        "--loop uvloop",
        "--serve-artifacts",
        "--artifacts-destination",
        str(folder / "mlflow-artifacts"),
        "--port",
    ]
    with _server(folder, "mlflow", argv, own, "/api/2.0/mlflow/experiments/get?experiment_id=0") as served:
        yield served


@contextmanager
def _server(
    folder: Path, name: str, argv: Sequence[str], own: Mapping[str, str], path: str
) -> Iterator[tuple[str, psutil.Process]]:
    """A Python process that is told its port last, from when it answers on a path."""
    port, log = ports.free(), folder / f"{name}.log"
    url = f"http://127.0.0.1:{port}"

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return processes.spawn([sys.executable, *argv, str(port)], env=os.environ | own, cwd=folder, output=output)

    with started(start, lambda: answers(url + path), name, log) as process:
        yield url, psutil.Process(process.pid)


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds so far of a process and all its children."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # gone meanwhile, and counted by who waited for it
            used = each.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total
