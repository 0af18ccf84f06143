"""One person's data, erased: what was kept, what is on its way, and who learned from it."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import traffic

from deploy import recorder
from infra.db import transaction
from infra.errors import UsageError
from infra.settings import Settings
from infra.storage import text_digest
from monitoring import erasure, feedback, windows
from registry import datasets

PAIR = ("f(x)", "Return x.")
WHO = {"actor": "os:ann@here", "reason": "request 17"}


@pytest.fixture
def kept(database: Settings) -> list[dict[str, Any]]:
    """Three requests with text: two of ada's, the first with a correction, and one of bob's."""
    profile = traffic.profile([], [])
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings={"monitoring": {"keep_text": True}})
    events = [
        traffic.event("m", 1, profile, PAIR, keep_text=True, at=traffic.minutes_ago(5), subject=text_digest(user),
                      client_request_id=f"{user}-{number}")
        for number, user in enumerate(("ada", "ada", "bob"))
    ]  # fmt: skip
    store(events)
    with transaction() as conn:
        for event in (events[0], events[2]):
            feedback.record(
                conn, [feedback.parse({"id": event["id"], "score": -1, "correction": "Mine.", "label": "x"})]
            )
        windows.close(conn)
    return events


def store(events: list[dict[str, Any]]) -> None:
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), events)


def texts() -> list[tuple[Any, ...]]:
    with transaction() as conn:
        rows = conn.execute(
            "select e.subject, e.messages is null as bare, e.answer, e.client_request_id, f.correction, f.label,"
            " f.score from request_event e left join feedback f on f.request_id = e.id order by e.at, e.id"
        ).fetchall()
    return sorted((tuple(row.values()) for row in rows), key=str)


def test_only_theirs_is_erased_and_counts_stay(kept: list[dict[str, Any]]) -> None:
    with transaction() as conn:
        done = erasure.erase(conn, "ada", **WHO)
    assert (done["events"], done["feedback"], done["datasets"], done["versions"]) == (2, 1, [], [])
    bob = (text_digest("bob"), False, "Return x.", "bob-2", "Mine.", "x", -1.0)
    bare = ("erased", True, None, None, None, None)
    assert texts() == sorted([bob, (*bare, None), (*bare, -1.0)], key=str)
    with transaction() as conn:
        assert windows.read(conn, "m", 1, traffic.minutes_ago(10), traffic.minutes_ago(0)).requests == 3
        assert erasure.erase(conn, "ada", **WHO)["events"] == 0
        assert [row["subject"] for row in conn.execute("select subject from erasure")] == [text_digest("ada")] * 2


def test_what_is_on_its_way_comes_without_text_and_what_comes_later_with_it(kept: list[dict[str, Any]]) -> None:
    with transaction() as conn:
        erasure.erase(conn, "ada", **WHO)
    late = dict(kept[0], id=str(traffic.uuid7(traffic.minutes_ago(1))))
    later = dict(kept[0], id=str(traffic.uuid7(traffic.minutes_ago(-1))))
    store([late, later])
    with transaction() as conn:
        rows = conn.execute("select id, messages is null as bare, subject from request_event where id = any(%s)",
                            ([late["id"], later["id"]],)).fetchall()  # fmt: skip
    found = {str(row["id"]): (row["bare"], row["subject"]) for row in rows}
    assert found == {late["id"]: (True, "erased"), later["id"]: (False, text_digest("ada"))}


def test_feedback_that_comes_later_keeps_no_text_either(kept: list[dict[str, Any]]) -> None:
    late = dict(kept[0], id=str(traffic.uuid7(traffic.minutes_ago(1))))
    say = {"score": -1, "correction": "Mine again.", "label": "x"}
    with transaction() as conn:
        feedback.record(conn, [feedback.parse(say | {"id": late["id"]})])  # before its event is there
        erasure.erase(conn, "ada", **WHO)
        feedback.record(conn, [feedback.parse(say | {"id": kept[1]["id"]})])
    store([late])
    with transaction() as conn:
        feedback.settle(conn)
        rows = conn.execute("select correction, label, score from feedback where request_id = any(%s)",
                            ([late["id"], kept[1]["id"]],)).fetchall()  # fmt: skip
    assert [tuple(row.values()) for row in rows] == [(None, None, -1.0)] * 2


def test_copies_of_their_requests_are_theirs(kept: list[dict[str, Any]]) -> None:
    copy = dict(kept[1], id=str(traffic.uuid7(traffic.minutes_ago(2))), subject=None, client_request_id=kept[1]["id"])
    store([copy])
    with transaction() as conn:
        assert erasure.erase(conn, "ada", **WHO)["events"] == 3
        assert conn.execute("select from request_event where subject is null").fetchone() is None


def test_who_learned_from_their_corrections_is_named(kept: list[dict[str, Any]]) -> None:
    row = datasets.make_row([*kept[0]["messages"], {"role": "assistant", "content": "Mine."}], source="feedback")
    made = datasets.keep({"train": [row], "validation": [], "test": []}, counts={}, sources=[], recipe={})
    with transaction() as conn:
        conn.execute(
            "insert into dataset (digest, model, counts, sources) values (%s, 'm', '{}', '[]')", (made.digest,)
        )
        conn.execute(
            "insert into version (model, number, bundle_digest, base_digest, dataset_digest, method, manifest, profile)"
            " values ('m', 2, 'sha256:w', 'sha256:b', %s, 'lora', '{}', '{}')",
            (made.digest,),
        )
        done = erasure.erase(conn, "ada", **WHO)
    assert [place["digest"] for place in done["datasets"]] == [made.digest]
    assert [(v["model"], v["version"]) for v in done["versions"]] == [("m", 2)]
    assert done["rows"] == [row.id]


@pytest.mark.parametrize(("user", "reason"), [("", "x"), ("  ", "x"), ("a\0", "x"), ("ada", " ")])
def test_nobody_and_no_reason_are_refused(database: Settings, user: str, reason: str) -> None:
    with transaction() as conn, pytest.raises(UsageError):
        erasure.erase(conn, user, actor="os:ann@here", reason=reason)
