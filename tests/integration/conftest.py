"""One real MLflow server for all tests that need it, on the session's PostgreSQL; a small base and an adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import mlflow_gateway
import numpy as np
import psycopg
import pytest
from lora import save_base
from safetensors.numpy import save_file
from sqlalchemy.engine import make_url

from infra import ports, processes
from infra.settings import Settings, get_settings
from registry import bases


@pytest.fixture(scope="session")
def mlflow_process(server: object) -> Iterator[str]:
    """The address of an MLflow server with a database of its own."""
    with mlflow_on(str(server.url)) as address:  # type: ignore[attr-defined]
        yield address


@contextmanager
def mlflow_on(url: str) -> Iterator[str]:
    """An MLflow server with a database of its own in the PostgreSQL server at an address; gives its own address."""
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
        **mlflow_gateway.VARIABLES,
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


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(database: Settings, base_folder: Path) -> bases.Base:
    """A small real base, known to the test's database and store."""
    return bases.resolve(str(base_folder))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A LoRA adapter in PEFT's form."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base_folder), "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): np.ones((4, 64), np.float32), name.format("B"): np.zeros((64, 4), np.float32)}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def model() -> str:
    """A name of the test's own, since the MLflow server is shared."""
    return f"m-{uuid.uuid4().hex[:8]}"
