"""Canaries in steps on real rows: events become windows, windows evidence, evidence changes of the deployment."""

from __future__ import annotations

import threading
import uuid
from datetime import timedelta
from typing import Any

import pytest
import traffic
from version_rows import add_version, add_versions

from deploy import recorder
from infra.db import transaction
from infra.errors import Conflict, NotFound, Refused
from infra.settings import Settings
from monitoring import alerts, canaries, watch, windows
from registry import approvals, deployments, judgements, rollouts
from registry.gates import Decision
from registry.rollouts import Plan, Rollout

WHO = {"actor": "os:ann@here", "reason": "try it"}
PLAN = Plan(steps=(0.1, 0.5), min_requests=50, min_minutes=10, max_hours=1)
PAIR = ("f(x)", "Return x.")


@pytest.fixture
def begun(database: Settings) -> Rollout:
    """Version 1 of m serves, and 2 has begun its canary."""
    add_versions("m", "pass", "pass", "pass", "fail")
    with transaction() as conn:
        deployments.promote(conn, "m", 1, **WHO)
        rollouts.begin(conn, "m", 2, PLAN, **WHO)
        return rollouts.newest(conn, "m")


def serve(version: int, each: int, *, first: int = 15, last: int = 2, **changes: object) -> None:
    """So many requests in each of the minutes, ``first`` to ``last`` ago."""
    profile = traffic.profile([], [])
    changes = {"slot": "champion" if version == 1 else "challenger"} | changes
    events = [
        traffic.event("m", version, profile, PAIR, at=traffic.minutes_ago(minute)) | changes
        for minute in range(first, last, -1)
        for _ in range(each)
    ]
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), events)
        windows.close(conn)


def pass_time(minutes: float) -> None:
    """As if the canary, and its step, had begun so much earlier."""
    with transaction() as conn:
        back = timedelta(minutes=minutes)
        conn.execute("update rollout set begun_at = begun_at - %(b)s, step_at = step_at - %(b)s", {"b": back})


def turn() -> None:
    watcher = watch.Watcher("test")
    watcher.turn()
    assert not [step.name for step in watcher._steps if step.failures and step.name != "relaying to MLflow"]
    watcher.release()


def now() -> tuple[Rollout, deployments.Deployment, list[deployments.Entry]]:
    with transaction() as conn:
        assert deployments.verify_chain(conn, "m") == []
        return rollouts.newest(conn, "m"), deployments.read(conn, "m"), deployments.history(conn, "m")


def test_a_version_that_is_judged_again_and_fails_is_taken_back(begun: Rollout) -> None:
    with transaction() as conn:
        said = Decision(decision="fail", reasons=["worse than thought"])
        judgements.keep(conn, "m", 2, {"metrics": {}}, said, **WHO)
    pass_time(20)
    serve(1, 6)
    serve(2, 6)
    turn()
    rollout, there, _ = now()
    assert (rollout.state, there.challenger) == ("taken_back", None)
    assert rollout.said == "m:2 is not promoted: its gate decision is fail"


def test_a_plan_that_hardly_compares_does_not_stand_for_a_judgement_beside_the_champion(database: Settings) -> None:
    with transaction() as conn:
        for number in (1, 2, 3):
            add_version(conn, "m", number, bundle=f"sha256:{number}")
        gates = [{"metric": "loss", "must": "not_worse", "against": "champion"}]
        said = Decision(decision="pass", reasons=[], gates=gates, champion=1, champion_bundle="sha256:1")
        judgements.keep(conn, "m", 3, {"metrics": {}}, said, **WHO)
        deployments.promote(conn, "m", 2, **WHO)
        for plan in (Plan(steps=(1.0,)), Plan(min_requests=1, min_minutes=0)):
            with pytest.raises(Refused, match="m:3 was judged beside another version, and version 2 serves now"):
                rollouts.begin(conn, "m", 3, plan, **WHO)
        assert rollouts.begin(conn, "m", 3, Plan(), **WHO).changed


def test_a_good_version_goes_from_step_to_step_and_serves(begun: Rollout) -> None:
    pass_time(20)
    serve(1, 6)
    serve(2, 3)
    turn()
    rollout, there, _ = now()
    assert (rollout.state, rollout.step, there.challenger_share) == ("running", 0, 0.1)
    assert rollout.said == "39 of 50 requests, 20 of 10 minutes"
    assert [f["name"] for f in rollout.findings] == [
        "errors",
        "abandoned",
        "truncated",
        "empty",
        "disliked",
    ]  # nothing came before
    serve(2, 3)
    turn()
    rollout, there, ledger = now()
    assert (rollout.step, there.challenger, there.challenger_share) == (1, 2, 0.5)
    assert (ledger[-1].actor, ledger[-1].action) == ("tunesmith for os:ann@here", "canary")
    assert ledger[-1].reason == "78 requests in 20 minutes and no sign that it is worse: from 10 % to 50 %"
    turn()
    assert now()[0].step == 1  # the requests of the step before do not count
    pass_time(20)
    turn()
    rollout, there, ledger = now()
    assert (rollout.state, there.champion, there.challenger) == ("promoted", 2, None)
    assert ledger[-1].reason.endswith("all steps are passed")
    assert rollout.ended_at is not None
    turn()
    assert now()[2] == ledger


def test_a_worse_version_is_taken_back(begun: Rollout) -> None:
    pass_time(20)
    serve(1, 10)
    serve(2, 2, status=503)
    turn()
    rollout, there, ledger = now()
    assert (rollout.state, there.champion, there.challenger) == ("taken_back", 1, None)
    assert (ledger[-1].action, ledger[-1].slot) == ("stop", "challenger")
    assert "it is worse: 100 % answers with status 500 or more, the champion's 0 %, of 26 requests" in rollout.said


def test_slow_and_long_are_told_by_what_the_champion_did_before(begun: Rollout) -> None:
    serve(1, 40, first=50, last=45)
    pass_time(20)
    serve(1, 20)
    serve(2, 20, latency_ms=250.0)
    turn()
    rollout, _, _ = now()
    assert rollout.state == "taken_back"
    assert {f["name"] for f in rollout.findings if f["worse"]} == {"slow", "slowest"}
    assert "slower" in rollout.said


def test_a_version_that_hangs_until_its_clients_leave_is_taken_back(begun: Rollout) -> None:
    """What it does answer looks well."""
    pass_time(20)
    serve(1, 10)
    serve(2, 3)
    serve(2, 2, status=499)
    turn()
    rollout, _, _ = now()
    assert rollout.state == "taken_back"
    assert {f["name"] for f in rollout.findings if f["worse"]} == {"abandoned"}
    assert "40 % requests whose clients left before the answer was whole, the champion's 0 %" in rollout.said


@pytest.mark.parametrize(
    ("worse", "champion", "challenger"),
    [("late", {"ttft_ms": 20.0}, {"ttft_ms": 60.0}), ("dear", {}, {"cost_usd": 0.00011})],
)
def test_late_and_dear_are_told_too(
    begun: Rollout, worse: str, champion: dict[str, Any], challenger: dict[str, Any]
) -> None:
    serve(1, 40, first=50, last=45, **champion)
    pass_time(20)
    serve(1, 20, **champion)
    serve(2, 20, **challenger)
    turn()
    rollout, _, _ = now()
    assert rollout.state == "taken_back"
    assert {f["name"] for f in rollout.findings if f["worse"]} == {worse}


def test_a_step_is_not_passed_by_what_nobody_has_looked_at(begun: Rollout) -> None:
    with transaction() as conn:
        conn.execute("update rollout set plan = plan || '{\"min_minutes\": 0}'")
    pass_time(1)
    serve(1, 60, first=0, last=-1)  # in the minute that is going on
    serve(2, 60, first=0, last=-1)
    turn()
    assert (now()[0].state, now()[0].step) == ("running", 0)


def test_who_changes_the_deployment_by_hand_has_the_last_word(begun: Rollout) -> None:
    with transaction() as conn:
        deployments.stop(conn, "m", "challenger", **WHO)
    turn()
    assert (now()[0].state, now()[0].said) == ("stopped", "the deployment was changed by hand")
    with transaction() as conn:
        rollouts.begin(conn, "m", 2, PLAN, **WHO)
        deployments.canary(conn, "m", 2, share=0.3, **WHO)
    turn()
    assert (now()[0].state, now()[1].challenger_share) == ("stopped", 0.3)
    with transaction() as conn:
        rollouts.begin(conn, "m", 3, PLAN, **WHO)
        deployments.promote(conn, "m", 3, **WHO)
    turn()
    assert now()[0].state == "promoted"


def test_a_challenger_whose_champion_went_is_taken_off(begun: Rollout) -> None:
    with transaction() as conn:
        deployments.promote(conn, "m", 3, **WHO)
    turn()
    rollout, there, _ = now()
    assert (rollout.state, there.champion, there.challenger) == ("stopped", 3, None)


def test_pinned_requests_and_copies_pass_no_step(begun: Rollout) -> None:
    pass_time(20)
    serve(1, 6)
    serve(2, 9, slot="pinned")
    serve(2, 9, slot="shadow")
    serve(2, 9, slot="pinned", status=500)  # nor do they take it back: nobody drew them
    turn()
    assert now()[0].said == "0 of 50 requests, 20 of 10 minutes"
    assert all(finding["requests"] == 0 for finding in now()[0].findings)


def test_a_stopped_canary_can_be_begun_again_at_once(begun: Rollout) -> None:
    with transaction() as conn:
        deployments.stop(conn, "m", "challenger", **WHO)
        assert rollouts.begin(conn, "m", 2, PLAN, **WHO).changed
    assert now()[0].id != begun.id


def test_of_two_that_begin_at_once_one_begins(database: Settings) -> None:
    add_versions("m", "pass", "pass", "pass")
    with transaction() as conn:
        deployments.promote(conn, "m", 1, **WHO)
    ready, ended = threading.Barrier(4), list[str]()

    def begin(number: int) -> None:
        ready.wait()
        try:
            with transaction() as conn:
                ended.append(str(rollouts.begin(conn, "m", number, PLAN, **WHO).changed))
        except Conflict:
            ended.append("conflict")

    threads = [threading.Thread(target=begin, args=(2 + each % 2,)) for each in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["False", "True", "conflict", "conflict"]


def test_too_little_traffic_ends_it_undecided(begun: Rollout) -> None:
    pass_time(61)
    turn()
    rollout, there, _ = now()
    assert (rollout.state, there.challenger) == ("stopped", None)
    assert rollout.said == "0 of 50 requests in 1 hours: too few to tell"


def test_an_alert_of_its_own_takes_it_back(begun: Rollout) -> None:
    with transaction() as conn:
        for version in (1, 2):
            conn.execute(
                "insert into alert (id, model, version, rule, severity, message)"
                " values (%s, 'm', %s, 'cost_usd above', 'warning', 'it is dear')",
                (uuid.uuid4(), version),
            )
        canaries.step(conn, "m", traffic.minutes_ago(0))
    assert now()[0].state == "running"  # the world changed, not the version
    with transaction() as conn:
        conn.execute("update alert set closed_at = now() where version = 1")
        canaries.step(conn, "m", traffic.minutes_ago(0))
        assert [a["version"] for a in alerts.listing(conn)] == [2]
    assert now()[0].state == "taken_back"
    assert "cost_usd above: it is dear" in now()[2][-1].reason


@pytest.mark.parametrize(
    ("steps", "words"),
    [((0.5,), "all steps are passed, but m:2 is not promoted: it needs 1 approval"),
     ((0.1, 0.5), "from 10 % to 50 %, but m:2 gets no more traffic: it needs 1 approval")],
)  # fmt: skip
def test_approvals_that_are_missing_hold_it_where_it_is(
    database: Settings, steps: tuple[float, ...], words: str
) -> None:
    add_versions("m", "pass")
    with transaction() as conn:
        add_version(conn, "m", 2, approvals=1)
        deployments.promote(conn, "m", 1, **WHO)
        rollouts.begin(conn, "m", 2, Plan(steps=steps, min_requests=10, min_minutes=0), **WHO)
    pass_time(20)
    serve(2, 1)
    turn()
    rollout, there, _ = now()
    assert (rollout.state, rollout.step, there.champion, there.challenger) == ("running", 0, 1, 2)
    assert words in rollout.said
    with transaction() as conn:
        approvals.approve(conn, "m", 2, actor="os:bob@here", role="operator", reason="read it")
    turn()
    last = len(steps) == 1
    assert (now()[0].state, now()[1].champion) == (("promoted", 2) if last else ("running", 1))
    assert now()[1].challenger_share == (0.0 if last else 0.5)


def test_one_canary_at_a_time_and_only_of_what_passed(begun: Rollout) -> None:
    with transaction() as conn:
        assert not rollouts.begin(conn, "m", 2, PLAN, **WHO).changed
    for plan, number in ((Plan(), 2), (PLAN, 3)):
        with transaction() as conn, pytest.raises(Conflict, match="m:2 is at 10 % already"):
            rollouts.begin(conn, "m", number, plan, **WHO)
    with transaction() as conn, pytest.raises(Refused, match="its gate decision is fail"):
        rollouts.begin(conn, "m", 4, PLAN, **WHO)
    add_versions("alone", "pass")
    with transaction() as conn, pytest.raises(Refused, match="No version of alone serves"):
        rollouts.begin(conn, "alone", 1, PLAN, **WHO)
    with transaction() as conn, pytest.raises(NotFound, match="has had no canary in steps"):
        rollouts.newest(conn, "alone")
    assert now()[0] == begun
