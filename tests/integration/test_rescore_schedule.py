"""The schedule of a golden set, in a real Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import child, wait_for

from infra import ports
from infra.errors import NotFound
from infra.prefect import call
from infra.settings import Settings, get_settings


@pytest.fixture
def prefect(database: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with our work pool; gives its address."""
    port = ports.free()
    url = f"http://127.0.0.1:{port}/api"
    own = {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/prefect.db",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    argv = ("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    with child(*argv, log=database.home / "prefect.log", **own):

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/health", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, 180, f"for Prefect, see {database.home}")
        monkeypatch.setenv("PREFECT_API_URL", url)
        get_settings.cache_clear()
        call("POST", "/work_pools/", {"name": "tunesmith", "type": "process"})
        yield url


def ensure(cron: str | None) -> None:
    """In a process of its own, as a run is: Prefect reads its settings once."""
    code = f"from pipelines import schedules; schedules.ensure_rescore('demo', {cron!r})"
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def deployment() -> Any:
    return call("GET", "/deployments/name/rescore/demo")


def test_a_schedule_follows_the_file_and_stays_paused_while_that_is_the_same(prefect: str) -> None:
    ensure(None)
    ensure("0 3 * * *")
    made = deployment()
    assert [s["schedule"]["cron"] for s in made["schedules"]] == ["0 3 * * *"]
    assert made["parameters"] == {"model": "demo"}
    call("POST", f"/deployments/{made['id']}/pause_deployment")
    ensure("0 3 * * *")
    assert deployment()["paused"] is True
    ensure("30 4 * * *")
    assert [s["schedule"]["cron"] for s in deployment()["schedules"]] == ["30 4 * * *"]
    ensure(None)
    with pytest.raises(NotFound):
        deployment()
