"""The schedule of a golden set and its flow, with a real Prefect server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import add_version, child, make_stand, wait_for

from infra import ports
from infra.db import transaction
from infra.errors import NotFound, UsageError
from infra.prefect import call
from infra.settings import Settings, get_settings
from monitoring import golden
from pipelines import schedules
from registry import datasets, deployments


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


def python(code: str) -> str:
    """In a process of its own, as a run is: Prefect reads its settings once."""
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ensure(cron: str | None) -> None:
    python(f"from pipelines import schedules; schedules.ensure_rescore('demo', {cron!r})")


def deployment() -> Any:
    return call("GET", "/deployments/name/rescore/demo")


def test_a_schedule_follows_the_file_and_stays_paused_while_that_is_the_same(prefect: str) -> None:
    ensure(None)
    ensure("0 3 * * *")
    made = deployment()
    assert [s["schedule"]["cron"] for s in made["schedules"]] == ["0 3 * * *"]
    assert made["parameters"] == {"model": "demo"}
    [listed] = schedules.list_schedules()
    assert (listed["name"], listed["cron"], listed["paused"]) == ("rescore/demo", "0 3 * * *", False)
    assert schedules.pause("rescore/demo")["paused"] is True
    with pytest.raises(UsageError, match="stands in the pipeline file of demo"):
        schedules.remove("rescore/demo")
    ensure("0 3 * * *")
    assert deployment()["paused"] is True
    ensure("30 4 * * *")
    assert [s["schedule"]["cron"] for s in deployment()["schedules"]] == ["30 4 * * *"]
    ensure(None)
    with pytest.raises(NotFound):
        deployment()


def test_the_flow_asks_what_serves_and_waits_for_something_that_does(
    prefect: str, database: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "from pipelines import flows; print(flows.rescore('demo', return_state=True).type.value)"
    assert python(run).split()[-1] == "CANCELLED"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "demo-v1 word0 word1"}]
    row = datasets.make_row(turns)
    dataset = datasets.keep({"test": [row]}, counts={}, sources=[], recipe={})
    add_version("demo", 1, dataset=dataset, evaluation={"metrics": {}, "answers": {row.id: row.answer}})
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()
        monkeypatch.setenv("TUNESMITH_GATEWAY_URL", stand.url)
        assert python(run).split()[-1] == "COMPLETED"
    with transaction() as conn:
        (kept,) = golden.newest(conn, "demo", 1)
    assert (kept["rows"], kept["score"]["estimate"], kept["changed"]["worse"]) == (1, 1, 0)
