"""Flow runs whose process is gone free their slot; those that live are left alone."""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid

import httpx
import psycopg

from infra import state
from tests.stacks import Stack

RECONCILE = (
    "from infra.reconcile import reconcile; from infra.settings import get_settings\n"
    "reconcile(get_settings(), own_pool=False)\n"
)


def running_flow(http: httpx.Client) -> str:
    flow = http.post("/flows/", json={"name": "reconcile-test"}).json()["id"]
    body = {"flow_id": flow, "state": {"type": "RUNNING", "name": "Running"}}
    made: str = http.post("/flow_runs/", json=body).json()["id"]
    forced = {"state": {"type": "RUNNING", "name": "Running"}, "force": True}
    http.post(f"/flow_runs/{made}/set_state", json=forced).raise_for_status()
    return made


def kept_run(conn: psycopg.Connection[tuple[object, ...]], model: str, flow_run: str, holder: str, left: int) -> None:
    """A running row of `model`, under a lease of `holder` with `left` seconds to go."""
    conn.execute("insert into model (name) values (%s)", (model,))
    conn.execute(
        "insert into lease (name, holder, token, expires_at) values (%s, %s, 1, now() + make_interval(secs => %s))",
        (f"run:{model}", holder, left),
    )
    conn.execute(
        "insert into run (id, model, kind, state, fingerprint, config, config_path, token, flow_run_id)"
        " values (%s, %s, 'train', 'running', 'f', '{}', 'f.yaml', 1, %s)",
        (uuid.uuid4(), model, flow_run),
    )


def test_dead_runs_are_crashed_and_living_ones_left(stack: Stack) -> None:
    found = state.read(stack.home)
    assert found is not None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    names = ("living", "expired", "killed", "elsewhere")
    with httpx.Client(base_url=stack.prefect_url, trust_env=False, timeout=60) as http:
        flows = {name: running_flow(http) for name in names}
        stranger = running_flow(http)  # nothing of ours knows it
    with psycopg.connect(found.settings["database_url"], autocommit=True) as conn:
        models = {name: f"{name}-{uuid.uuid4().hex[:6]}" for name in names}
        living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        try:
            for name, holder, left in (
                ("living", f"{host}:{living.pid} run", 600),
                ("expired", f"{host}:{living.pid} run", -1),
                ("killed", f"{host}:{ended.pid} run", 600),
                ("elsewhere", "another-machine:1 run", 600),
            ):
                kept_run(conn, models[name], flows[name], holder, left)
            done = subprocess.run(
                [sys.executable, "-c", RECONCILE],
                env={"TUNESMITH_HOME": str(stack.home), "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        finally:
            living.kill()
            living.wait()
        freed = conn.execute(
            "select expires_at <= clock_timestamp() from lease where name = %s", (f"run:{models['killed']}",)
        ).fetchone()
        conn.execute("update run set state = 'cancelled' where model = any(%s)", (list(models.values()),))
    with httpx.Client(base_url=stack.prefect_url, trust_env=False, timeout=60) as http:
        states = {
            name: http.get(f"/flow_runs/{flow}").json()["state"]["type"]
            for name, flow in {**flows, "stranger": stranger}.items()
        }
    assert states == {
        "living": "RUNNING",
        "expired": "CRASHED",
        "killed": "CRASHED",
        "elsewhere": "RUNNING",
        "stranger": "RUNNING",
    }
    assert freed == (True,)  # a killed run can be resumed at once
