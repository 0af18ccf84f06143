"""Replays through a real gateway: what people asked is asked again, and shadows are compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from serving import Stand, add_version, make_stand, wait_for

from deploy.auth import list_keys
from infra.db import transaction
from infra.errors import NotFound, UsageError
from infra.settings import Settings, get_settings
from monitoring import commands, windows
from registry import deployments


@pytest.fixture
def stand(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """Version 1 of demo serves, and text is kept; 2 is there."""
    for number in (1, 2):
        add_version("demo", number, settings={"monitoring": {"keep_text": True}})
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()
        monkeypatch.setenv("TUNESMITH_GATEWAY_URL", stand.url)
        get_settings.cache_clear()
        yield stand


def replay(*arguments: str) -> Any:
    return CliRunner().invoke(commands.replay, ["demo:2", *arguments])


def test_what_people_asked_is_asked_again_and_compared(stand: Stand) -> None:
    for text in ("one", "two", "two", "three"):
        stand.ask(text=text)
    stand.wait_events(4)
    done = replay("--json")
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert (found["source"], found["champion"], found["requests"], found["failed"]) == ("replay", 1, 3, 0)
    assert found["same"]["estimate"] == 0  # an engine here answers with its adapter's name
    assert 0.5 < found["similarity"]["estimate"] < 1
    assert found["tokens"]["estimate"] == 0
    assert {e["question"] for e in found["examples"]} == {"one", "two", "three"}
    assert (found["examples"][0]["then"], found["examples"][0]["now"]) == ("demo-v1 word0 word1", "demo-v2 word0 word1")
    again = stand.wait_events(7)[4:]
    assert {(event["version"], event["slot"]) for event in again} == {(2, "pinned")}
    told = {body["model"]: body.get("priority") for body in stand.stats()["bodies"]}
    assert (told["demo-v1"], told["demo-v2"]) == (None, 1)
    with transaction() as conn:
        (key,) = [key for key in list_keys(conn) if key.name.startswith("replay to demo:2 ")]
    assert key.revoked_at is not None
    with transaction() as conn:
        windows.close(conn)
        assert {row["version"] for row in conn.execute("select version from traffic_window")} == {1}, "no traffic"
    shown = replay("--limit", "2").stdout
    assert "demo:2 beside demo:1: 2 requests, 0 failed" in shown
    assert "the same answer" in shown


def test_a_candidate_that_fails_is_counted(stand: Stand) -> None:
    stand.ask(text="one")
    stand.wait_events(1)
    with transaction() as conn:
        conn.execute('update request_event set messages = \'[{"role": "user", "content": "fail"}]\'')
    stand.ask(text="two")
    stand.wait_events(2)
    found = json.loads(replay("--json").stdout)
    assert (found["requests"], found["failed"]) == (2, 1)


def test_what_a_shadow_answered_is_compared(stand: Stand) -> None:
    assert isinstance(replay("--shadow").exception, NotFound)
    with transaction() as conn:
        deployments.shadow(conn, "demo", 2, actor="test")
    wait_for(lambda: "demo-v2" in stand.stats()["loaded"], what="for the shadow")
    for text in ("one", "two", "three"):
        stand.ask(text=text)
    stand.wait_events(6)
    with transaction() as conn:  # for which the engine had no time
        conn.execute(
            "update request_event set status = 429, answer = null"
            " where id = (select max(id::text)::uuid from request_event where slot = 'shadow')"
        )
    found = json.loads(replay("--shadow", "--json").stdout)
    assert (found["source"], found["requests"], found["failed"]) == ("shadow", 2, 0)
    assert {e["now"] for e in found["examples"]} == {"demo-v2 word0 word1"}


def test_without_text_or_another_champion_it_says_so(stand: Stand) -> None:
    assert "keep_text" in str(getattr(replay().exception, "hint", ""))
    with transaction() as conn:
        deployments.promote(conn, "demo", 2, actor="test", reason="test", force=True)
    assert isinstance(replay().exception, UsageError)
