"""One real MLflow server for all tests that need it, on the session's PostgreSQL."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy.engine import make_url

from infra import ports, processes
from infra.settings import Settings, get_settings


@pytest.fixture(scope="session")
def mlflow_process(server: object) -> Iterator[str]:
    """The address of an MLflow server with a database of its own."""
    url = str(server.url)  # type: ignore[attr-defined]
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("create database mlflow_tests")
    store = make_url(url).set(drivername="postgresql+psycopg", database="mlflow_tests")
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-mlflow-"))
    port = ports.free()
    env = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": store.render_as_string(hide_password=False),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    argv += ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as output:
        child = processes.spawn(argv, env=env, cwd=folder, output=output)
        try:
            _wait(f"{address}/health", folder / "log")
            yield address
        finally:
            processes.signal_group(child.pid, signal.SIGKILL)
            child.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mlflow_server(mlflow_process: str, database: Settings, monkeypatch: pytest.MonkeyPatch) -> str:
    """The session's MLflow server, as the settings of this test's home say; gives its address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_process)
    get_settings.cache_clear()
    return mlflow_process


def _wait(url: str, log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        try:
            if httpx.get(url, trust_env=False, timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"MLflow did not start:\n{log.read_text()}")
