"""Feedback finds its request, whenever it comes; a bulk file names its wrong lines."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import traffic
from click.testing import CliRunner, Result
from sacrebleu.metrics.chrf import CHRF

from deploy import recorder
from infra.db import one, transaction
from infra.errors import NotFound, UsageError
from infra.settings import Settings
from monitoring import attribution, drift, feedback, records, windows

PAIRS = [(f"os.path.join{i}(a, *p)", f"Join two or more pathname components, {i}.") for i in range(40)]
PROFILE = traffic.profile(PAIRS, PAIRS)


@pytest.fixture
def model(database: Settings) -> str:
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
        traffic.register(conn, "other", 1, PROFILE, settings={})
    return "m"


def event(**changes: Any) -> dict[str, Any]:
    return traffic.event("m", 1, PROFILE, PAIRS[0], at=traffic.minutes_ago(1), **changes)


def send(*events: dict[str, Any]) -> None:
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), events)


def give(value: dict[str, Any], **options: Any) -> dict[str, Any]:
    with transaction() as conn:
        [identifier] = feedback.record(conn, [feedback.parse(value)], **options)
    return row(identifier)


def row(identifier: uuid.UUID | str) -> dict[str, Any]:
    with transaction() as conn:
        return one(conn, "select * from feedback where request_id = %(id)s", {"id": str(identifier)})


def test_made_up_requests_hold_up_nobody(model: str) -> None:
    real = event()
    give({"request_id": real["id"], "score": 1})
    for _ in range(30):
        give({"request_id": str(traffic.uuid7(traffic.minutes_ago(0))), "score": -1})
    send(real)
    with transaction() as conn:
        assert feedback.settle(conn, limit=10) == 1
        assert feedback.settle(conn, limit=10) == 0
    assert row(real["id"])["model"] == "m"


def test_last_write_wins_and_similarity_is_chrf(model: str) -> None:
    kept = event(keep_text=True)
    send(kept)
    first = give({"request_id": kept["id"], "score": 1})
    assert (first["model"], first["version"], first["score"], first["similarity"]) == ("m", 1, 1, None)
    second = give({"id": f"chatcmpl-{kept['id']}", "score": -1, "correction": "Join path components."})
    expected = CHRF().sentence_score(kept["answer"], ["Join path components."]).score / 100
    assert second["score"] == -1
    assert second["similarity"] == pytest.approx(expected)
    third = give({"request_id": kept["id"], "label": "checked"})
    assert (third["score"], third["correction"]) == (-1, "Join path components."), "what was not given stays"
    assert give({"request_id": kept["id"], "correction": None})["correction"] is None, "what is given as null goes"


def test_a_review_changes_neither_when_nor_by_whom_an_answer_was_scored(model: str) -> None:
    """What is reviewed was chosen for being doubtful: it must move neither drift nor what drift is compared with."""
    kept = event(keep_text=True)
    send(kept)
    give({"request_id": kept["id"], "score": -1}, key_id="user")
    with transaction() as conn:
        conn.execute("update feedback set at = at - interval '3 days', scored_at = scored_at - interval '3 days'")
    scored = row(kept["id"])
    reviewed = give({"request_id": kept["id"], "score": -1, "correction": "Join."}, key_id="reviewer", reviewing=True)
    assert (reviewed["key_id"], reviewed["reviewer"], reviewed["score"]) == ("user", "reviewer", -1)
    assert (reviewed["scored_at"], reviewed["review"]) == (scored["scored_at"], -1)
    assert reviewed["similarity"] is not None
    now = datetime.now(UTC)
    with transaction() as conn:
        found = drift.quality(conn, "m", 1, now - timedelta(days=1), now)
        assert {name: sum(counts) for name, counts in found.items()} == {"similarity": 0, "score": 0}
        assert sum(attribution.earlier_scores(conn, "m", 1, now - timedelta(days=1))) == 1
    again = give({"request_id": kept["id"], "score": 1}, key_id="another")
    assert (again["key_id"], again["reviewer"]) == ("another", "reviewer")
    assert again["scored_at"] > scored["scored_at"]


def test_feedback_before_its_event(model: str) -> None:
    late = event(keep_text=True)
    early = give({"request_id": late["id"], "correction": late["answer"]})
    assert (early["model"], early["version"]) == ("", None)
    assert abs((early["request_at"] - traffic.minutes_ago(1)).total_seconds()) < 5
    send(late)
    with transaction() as conn:
        assert feedback.settle(conn) == 1
        assert feedback.settle(conn) == 0
    joined = row(late["id"])
    assert (joined["model"], joined["version"], joined["similarity"]) == ("m", 1, 1.0)


def test_windows_count_what_was_said_last_once(model: str) -> None:
    def counted() -> list[dict[str, int]]:
        """What the minute, the hour and the day have."""
        with transaction() as conn:
            rows = conn.execute("select sketches from traffic_window order by array_position("
                                "array['minute', 'hour', 'day'], grain)").fetchall()  # fmt: skip
        return [{name: n for name, n in row["sketches"]["feedback"].items() if n} for row in rows]

    def count() -> int:
        with transaction() as conn:
            return windows.count_feedback(conn)

    kept, other = event(keep_text=True), event()
    send(kept, other)
    give({"request_id": kept["id"], "score": -1})
    assert count() == 0, "its minute has no window yet"
    with transaction() as conn:
        windows.close(conn)
    assert counted() == [{}, {}, {}]
    assert (count(), count()) == (1, 0)
    assert counted() == 3 * [{"rated": 1, "disliked": 1}]
    give({"request_id": other["id"], "score": 1, "correction": "Join."})
    give({"request_id": kept["id"], "label": "checked"})
    assert count() == 1
    assert counted() == 3 * [{"rated": 2, "disliked": 1, "corrected": 1}]
    give({"request_id": kept["id"], "score": 1})
    give({"request_id": other["id"], "correction": None})
    assert count() == 2
    assert counted() == 3 * [{"rated": 2}]
    with transaction() as conn:
        found = windows.read(conn, "m", 1, traffic.minutes_ago(3), traffic.minutes_ago(0))
    assert (found.requests, found.feedback["rated"], found.feedback["disliked"]) == (2, 2, 0)


def test_feedback_on_what_has_no_minutes_any_more_counts_in_its_day(model: str) -> None:
    old = event()
    send(old)
    give({"request_id": old["id"], "score": -1})
    with transaction() as conn:
        windows.close(conn)
        conn.execute("update feedback set request_at = request_at - interval '9 days'")
        conn.execute("update traffic_window set start = start - interval '9 days' where grain <> 'minute'")
        conn.execute("delete from traffic_window where grain = 'minute'")
        assert windows.count_feedback(conn) == 1
        rows = conn.execute("select grain, sketches from traffic_window").fetchall()
    assert {row["grain"]: row["sketches"]["feedback"] for row in rows} == {
        grain: {"rated": 1, "disliked": 1} for grain in ("hour", "day")
    }


def test_client_ids_are_looked_for_among_the_key_s_own_requests(model: str) -> None:
    mine = event(client_request_id="job-7", key_id="mine")
    theirs = event(client_request_id="job-8", key_id="theirs")
    send(mine, theirs)
    assert str(give({"request_id": "job-7", "score": 0}, key_id="mine", own_only=True)["request_id"]) == mine["id"]
    with pytest.raises(NotFound, match="job-8"):
        give({"request_id": "job-8", "score": 0}, key_id="mine", own_only=True)


def test_ids_that_clients_made_as_ours_are_made_are_theirs(model: str) -> None:
    made, copied = (str(traffic.uuid7(traffic.minutes_ago(1))) for _ in range(2))
    theirs, copy = event(client_request_id=made), event(client_request_id=copied, slot="shadow")
    send(theirs, copy)
    assert str(give({"request_id": made, "score": 0})["request_id"]) == theirs["id"]
    assert str(give({"request_id": copied, "score": 0})["request_id"]) == copied, "whose event is on its way"
    with transaction() as conn:
        traffic.register(conn, "router", 1, PROFILE, settings={})
    first, later = (event(client_request_id="both") | {"model": name} for name in ("m", "router"))
    send(first, later)
    for name, sent in (("m", first), ("router", later)):  # which went through both
        assert str(give({"request_id": "both", "score": 1}, model=name)["request_id"]) == sent["id"]


@pytest.mark.parametrize(
    "value",
    [
        {"score": 1},
        {"request_id": "x"},
        {"request_id": "x", "score": 2},
        {"request_id": "x", "score": "nan"},
        {"request_id": "x", "id": "x", "score": 1},
        {"request_id": "x", "score": 1, "extra": 1},
        {"request_id": "x", "correction": "a\0b"},
        {"request_id": "0198c000-0000-7000-8000-000000000000", "score": 1, "id": None, "label": 5},
        [],
        None,
    ],
)
def test_what_is_not_feedback(value: Any) -> None:
    with pytest.raises(UsageError):
        feedback.parse(value)


def test_ids_of_another_time_are_refused(model: str) -> None:
    with pytest.raises(UsageError, match="older"):
        give({"request_id": "00000000-0000-7000-8000-000000000000", "score": 1})


def test_personal_data_in_corrections_is_redacted(model: str) -> None:
    kept = event()
    send(kept)
    assert "[EMAIL]" in give({"request_id": kept["id"], "correction": "Write to ada@example.org."})["correction"]


def command(path: Path, *more: str) -> Result:
    return CliRunner().invoke(records.feedback, ["m", str(path), *more])


def test_a_bulk_file(model: str, tmp_path: Path) -> None:
    events = [event(keep_text=True) for _ in range(60)]
    foreign = traffic.event("other", 1, PROFILE, PAIRS[0])
    send(*events, foreign)
    path = tmp_path / "corrections.jsonl"
    lines = [json.dumps({"request_id": e["id"], "score": -1, "correction": "Join."}) for e in events]
    path.write_text(
        "\n".join([*lines[:30], "{broken", "", *lines[30:], json.dumps({"request_id": foreign["id"], "score": 1})])
    )
    done = command(path, "--json")
    assert done.exit_code == 0, done
    result = json.loads(done.stdout)
    assert result["accepted"] == 60
    assert [r["line"] for r in result["rejected"]] == [31, 63]
    assert "not JSON" in result["rejected"][0]["reason"]
    assert "went to other" in result["rejected"][1]["reason"]
    with transaction() as conn:
        assert one(conn, "select count(*) as n from feedback where model = 'm' and similarity > 0")["n"] == 60


def test_a_file_that_is_mostly_wrong_is_not_taken(model: str, tmp_path: Path) -> None:
    good = event()
    send(good)
    path = tmp_path / "f.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps({"request_id": good["id"], "score": 1}).encode() + b"\n")
        file.write(b'{"request_id": "' + b"x" * 3_000_000 + b'"}\n')
        file.write(b'{"request_id": "\\ud800", "score": 1}\n{"request_id": "y", "score": 9}\n\xff\n')
    with pytest.raises(UsageError, match="4 of 5 lines") as caught:
        CliRunner().invoke(records.feedback, ["m", str(path)], catch_exceptions=False)
    assert [r["line"] for r in caught.value.details["rejected"]] == [2, 3, 4, 5]
    with transaction() as conn:
        assert one(conn, "select count(*) as n from feedback")["n"] == 0
    with pytest.raises(NotFound):
        CliRunner().invoke(records.feedback, ["m", str(tmp_path / "none")], catch_exceptions=False)


def test_a_file_of_which_nothing_is_taken_fails(model: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("\n \n")
    with pytest.raises(UsageError, match=r"f\.jsonl is empty"):
        CliRunner().invoke(records.feedback, ["m", str(path)], catch_exceptions=False)
    path.write_text('{"request_id": "nobody", "score": 1}\n\n{"request_id": "no-one", "score": 1}\n')
    with pytest.raises(UsageError, match="none of its 2 lines was taken: line 1: No request 'nobody'") as caught:
        CliRunner().invoke(records.feedback, ["m", str(path)], catch_exceptions=False)
    assert [r["line"] for r in caught.value.details["rejected"]] == [1, 3]
