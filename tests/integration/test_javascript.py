"""OpenAI's own JavaScript client, from npm, against the gateway; needs node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Stand, add_version, make_stand, wait_for

from infra.db import transaction
from infra.settings import Settings
from registry import deployments

CLIENT = "openai@6"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed"),
]


@pytest.fixture
def stand(database: Settings) -> Iterator[Stand]:
    for number in (1, 2):
        add_version("demo", number)
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()
        yield stand


def test_the_official_javascript_client(stand: Stand, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("openai_client.mjs"), tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", CLIENT]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    done = subprocess.run(
        ["node", "openai_client.mjs", stand.url, stand.keys["service"]],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    said = "demo-v1 word0 word1"
    assert seen["chat"] == {"model": "demo:1", "text": said, "usage": usage, "version": "demo:1", "id": True}
    assert seen["stream"] == {"text": said, "finish": "stop", "usage": usage, "models": ["demo:1"]}
    assert seen["helper"] == said
    assert seen["completion"].startswith("demo-v2")
    assert {"demo", "demo:1", "demo:2"} <= set(seen["models"])
    assert (seen["unknown"]["kind"], seen["unknown"]["status"]) == ("NotFoundError", 404)
    assert (seen["wrong"]["kind"], seen["wrong"]["param"]) == ("BadRequestError", "n")
    assert (seen["full"]["kind"], seen["full"]["status"]) == ("RateLimitError", 429)
    assert (seen["failed"]["kind"], seen["failed"]["status"]) == ("InternalServerError", 502)
    assert (seen["stranger"]["kind"], seen["stranger"]["status"]) == ("AuthenticationError", 401)
    wait_for(lambda: stand.stats()["active"] == 0, 10, "for the slot of who went away")
