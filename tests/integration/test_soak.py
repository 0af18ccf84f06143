"""Half an hour at half load: memory stays as it is, and every request is accounted for."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import engine_peer
import psutil
import pytest
from lora import save_adapter, save_base
from serving import Stand, add_version, child, make_stand, wait_for

from infra.db import transaction
from infra.settings import Settings
from registry import bases, deployments

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
LOAD = Path(__file__).parents[1] / "benchmarks" / "gateway_peer.py"
GROWTH = 1.10  # of the memory after a sixth of the time: caches and pools are full by then


def load(stand: Stand, seconds: float, connections: int, rate: float = 0.0) -> dict[str, Any]:
    message = {"role": "user", "content": "the cat sat on the mat"}
    body = {"model": "demo", "messages": [message], "max_tokens": 8}
    asked = {"headers": stand.header(), "body": body, "words": '"model":"demo:1"'}
    arguments = [sys.executable, str(LOAD), "load", f"{stand.url}/v1/chat/completions"]
    done = subprocess.run(
        [*arguments, str(seconds), str(connections), str(rate)],
        input=json.dumps(asked), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def megabytes(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 2**20)


def recorded() -> dict[int, int]:
    """Requests by status."""
    with transaction() as conn:
        rows = conn.execute("select status, count(*) as n from request_event group by status").fetchall()
    return {row["status"]: row["n"] for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_half_an_hour_at_half_load(database: Settings, tmp_path: Path) -> None:
    base = bases.resolve(str(save_base(tmp_path / "base")))
    adapter = save_adapter(bases.load_model(base.folder, "float32"), tmp_path / "adapter", seed=1)
    add_version("demo", 1, base=base.digest, adapter=adapter)
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with make_stand(database.home) as stand:
        with transaction() as conn:
            conn.execute("delete from engine")
        engine = ("-m", "pipelines.cli", "engine", "--base", base.digest, "--port", stand.engine_url.rsplit(":")[-1])
        environment = {"TUNESMITH_ENGINE_SECRET": engine_peer.SECRET, "OMP_NUM_THREADS": "1"}
        with (
            child(*engine, log=database.home / "engine.log", **environment) as engine_process,
            stand.running_gateway(),
        ):
            wait_for(lambda: stand._status() == 200, 120, f"for gateway and engine, see {database.home}")
            assert stand.gateway is not None
            processes = {"gateway": psutil.Process(stand.gateway.pid), "engine": psutil.Process(engine_process.pid)}
            first = load(stand, 10, 32)
            rate = first["answered"] / first["seconds"] / 2
            memory: dict[str, list[float]] = {name: [] for name in processes}
            over = threading.Event()

            def watch() -> None:
                while not over.wait(MINUTES * 60 / 180):
                    for name, process in processes.items():
                        memory[name].append(megabytes(process))

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                found = load(stand, MINUTES * 60, 64, rate)
            finally:
                over.set()
                watcher.join()
            sent = [sum(part[what] for part in (first, found)) for what in ("answered", "refused", "failed")]
            assert sent[2] == 0, found["why"]
            until = time.monotonic() + 60
            while sum(recorded().values()) < sum(sent) and time.monotonic() < until:
                time.sleep(0.5)
            assert recorded() == {status: n for status, n in ((200, sent[0]), (429, sent[1])) if n}
            for name, values in memory.items():
                sixth = len(values) // 6
                before, after = (statistics.median(part) for part in (values[sixth : 2 * sixth], values[-sixth:]))
                assert after <= GROWTH * before, f"{name} grew from {before:.0f} to {after:.0f} MB"
