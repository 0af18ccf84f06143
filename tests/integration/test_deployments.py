"""What serves changes by one winner, on the record, entirely or not at all (faults 5, 6, 8)."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from psycopg.rows import DictRow, dict_row
from version_rows import add_version, add_versions

from infra import db, migrate, ports, postgres
from infra.db import one, transaction
from infra.errors import Conflict, NotFound, Refused, UsageError
from infra.settings import Settings, get_settings
from registry import deployments, judgements, versions
from registry.deployments import Change
from registry.gates import Decision

UNSYNCED = {"fsync": "off"}  # the machine does not fail in these tests
WHO = {"actor": "os:test@here", "reason": "because"}


def _do(action: Callable[..., Change], *arguments: Any, **named: Any) -> Change:
    with transaction() as conn:
        return action(conn, "m", *arguments, **WHO | named)


def _now() -> deployments.Deployment:
    with transaction() as conn:
        return deployments.read(conn, "m")


def _problems() -> list[str]:
    with transaction() as conn:
        return deployments.verify_chain(conn, "m")


def test_promotions_stack_up_and_rollbacks_take_them_off(database: Settings) -> None:
    add_versions("m", "pass", "pass", "pass")
    for number in (1, 2, 3):
        assert _do(deployments.promote, number).deployment.champion == number
    assert _do(deployments.rollback).deployment.champion == 2
    assert _do(deployments.rollback).deployment.champion == 1
    with pytest.raises(Refused, match="Nothing served m before version 1"):
        _do(deployments.rollback)
    _do(deployments.promote, 3)
    assert _do(deployments.rollback).deployment.champion == 1
    assert _do(deployments.rollback, to=3).deployment.champion == 3  # its own promotion was taken back before
    assert _do(deployments.rollback).deployment.champion == 1
    with pytest.raises(NotFound):
        _do(deployments.rollback, to=9)
    with transaction() as conn:
        add_version(conn, "m", 4)
    with pytest.raises(Refused, match="m:4 has never served"):
        _do(deployments.rollback, to=4)
    assert _problems() == []


def test_what_already_serves_appends_nothing(database: Settings) -> None:
    add_versions("m", "pass", "pass")
    first = _do(deployments.promote, 1)
    again = _do(deployments.promote, 1)
    assert (first.changed, again.changed, again.entry, again.deployment.generation) == (True, False, None, 1)
    with pytest.raises(Conflict, match="generation 1, not 0"):
        _do(deployments.promote, 1, expect_generation=0)  # what was named is compared first
    assert _do(deployments.rollback, to=1).changed is False
    assert _do(deployments.stop, "shadow").changed is False
    with transaction() as conn:
        assert db.one(conn, "select count(*) as n from outbox")["n"] == 1


def test_a_gate_that_did_not_pass_needs_force_and_shows_for_ever(database: Settings) -> None:
    add_versions("m", "fail", "underpowered", None, "pass")
    for number, said in ((1, "fail"), (2, "underpowered"), (3, "never judged")):
        with pytest.raises(Refused, match=said):
            _do(deployments.promote, number)
    assert _now().generation == 0
    forced = _do(deployments.promote, 2, force=True)
    assert forced.entry is not None
    assert forced.entry.forced is True
    plain = _do(deployments.promote, 4, force=True)
    assert plain.entry is not None
    assert plain.entry.forced is False  # there was nothing to override
    assert plain.entry.evidence is not None


@pytest.mark.parametrize(
    "gate",
    [
        {"metric": "exact_match", "must": "not_worse", "against": "champion"},
        {"metric": "golden_kept", "must": "at_least", "value": 0.9, "against": None},
        {"metric": "suite compatibility", "must": "at_least", "value": 1, "against": None},
    ],
    ids=lambda gate: str(gate["metric"]),
)
def test_evidence_beside_another_champion_is_told_from_evidence_beside_this_one(
    database: Settings, gate: dict[str, Any]
) -> None:
    """Versions 2 and 3 are both judged beside 1: once 2 serves, nobody knows whether 3 is any better."""
    gates = [gate]
    with transaction() as conn:
        for number in (1, 2, 3):
            add_version(conn, "m", number, bundle=f"sha256:{number}")

    def judged(number: int, champion: int | None) -> None:
        bundle = f"sha256:{champion}" if champion else None
        decision = Decision(
            decision="pass", reasons=["it holds"], gates=gates, champion=champion, champion_bundle=bundle
        )
        with transaction() as conn:
            judgements.keep(conn, "m", number, {"metrics": {}}, decision, **WHO)

    _do(deployments.promote, 1)
    judged(2, 1)
    judged(3, 1)
    _do(deployments.promote, 2)
    for action, more in ((deployments.promote, {}), (deployments.canary, {"share": 0.9})):
        with pytest.raises(Refused, match="m:3 was judged beside another version, and version 2 serves now") as refused:
            _do(action, 3, **more)
        assert "tunesmith evaluate m:3 --attach REASON" in refused.value.hint
    assert _do(deployments.canary, 3, share=0.1).changed, "traffic may compare the two"
    forced = _do(deployments.promote, 3, force=True).entry
    assert forced is not None
    assert forced.forced
    _do(deployments.rollback)
    judged(3, 2)
    again = _do(deployments.promote, 3).entry
    assert again is not None
    assert not again.forced
    with transaction() as conn:
        evidence = one(conn, "select body from evidence where digest = %s", (again.evidence,))["body"]
        assert evidence["champion"] == 2
        assert [v["gate"] for v in versions.list_versions(conn, "m")] == ["pass"] * 3
        with pytest.raises(psycopg.errors.RaiseException, match="kept as they were made"), conn.transaction():
            conn.execute("update judgement set decision = 'pass'")
    judged(2, None)  # an import, or the first of its model
    _do(deployments.rollback, to=1)
    with pytest.raises(Refused, match="was judged beside no other version, and version 1 serves now"):
        _do(deployments.promote, 2)


def test_what_could_not_be_promoted_gets_no_more_than_half(database: Settings) -> None:
    add_versions("m", "pass", "underpowered", None)
    with transaction() as conn:
        add_version(conn, "m", 4, approvals=1, author="os:somebody@here")
    _do(deployments.promote, 1)
    for number, said in ((2, "is underpowered"), (3, "never judged"), (4, "1 more person")):
        assert _do(deployments.canary, number, share=0.5).changed
        for share in (0.51, 1.0):
            with pytest.raises(Refused, match=said):
                _do(deployments.canary, number, share=share)
        entry = _do(deployments.canary, number, share=1.0, force=True).entry
        assert entry is not None
        assert entry.forced
    with pytest.raises(UsageError, match="needs a reason"), transaction() as conn:
        deployments.canary(conn, "m", 3, share=0.9, actor="os:t@here", force=True)


def test_the_slots_around_a_champion(database: Settings) -> None:
    add_versions("m", "pass", "pass", "pass", "fail")
    with pytest.raises(Refused, match="No version of m serves"):
        _do(deployments.canary, 2, share=0.1)
    _do(deployments.promote, 1)
    with pytest.raises(Refused, match="is the champion"):
        _do(deployments.canary, 1, share=0.1)
    with pytest.raises(Refused, match="gets no traffic"):
        _do(deployments.canary, 4, share=0.1)
    with pytest.raises(UsageError):
        _do(deployments.canary, 2, share=0.0)
    _do(deployments.shadow, 2)
    now = _do(deployments.canary, 2, share=0.25).deployment  # from copies to real traffic: one slot
    assert (now.challenger, now.challenger_share, now.shadow) == (2, 0.25, None)
    assert _do(deployments.canary, 2, share=0.25).changed is False
    assert _do(deployments.canary, 2, share=0.5).changed is True
    with pytest.raises(Refused, match="is the challenger"):
        _do(deployments.shadow, 2)
    _do(deployments.shadow, 3)
    now = _do(deployments.promote, 2).deployment
    assert (now.champion, now.challenger, now.challenger_share, now.shadow) == (2, None, 0.0, 3)
    assert _do(deployments.rollback).deployment.champion == 1
    assert _do(deployments.stop, "shadow").deployment.shadow is None
    assert _problems() == []


def test_history_answers_what_served_then(database: Settings) -> None:
    add_versions("m", "pass", "pass")
    _do(deployments.promote, 1)
    _do(deployments.canary, 2, share=0.1)
    between = _do(deployments.promote, 2).entry
    assert between is not None
    _do(deployments.rollback)
    with transaction() as conn:
        then = deployments.replay("m", deployments.history(conn, "m", between.at))
        before = deployments.replay("m", deployments.history(conn, "m", between.at - timedelta(microseconds=1)))
        nothing = deployments.history(conn, "m", datetime(2000, 1, 1, tzinfo=UTC))
        whole = deployments.history(conn, "m")
    assert (then.champion, then.challenger, then.generation) == (2, None, 3)
    assert (before.champion, before.challenger, before.challenger_share) == (1, 2, 0.1)
    assert nothing == []
    assert [entry.action for entry in whole] == ["promote", "canary", "promote", "rollback"]
    with pytest.raises(NotFound), transaction() as conn:
        deployments.history(conn, "unknown")


def test_the_ledger_cannot_be_changed_and_a_changed_one_is_found(database: Settings) -> None:
    add_versions("m", "pass", "pass", "pass")
    for number in (1, 2, 3):
        _do(deployments.promote, number)
    for statement in ("update ledger set reason = 'x'", "delete from ledger", "truncate ledger"):
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"), transaction() as conn:
            conn.execute(statement)
    for tamper, found in (
        ("update ledger set reason = 'x' where generation = 2", "Generation 2 of m was changed after"),
        ("update ledger set at = at - interval '1 day' where generation = 1", "Generation 1 of m was changed after"),
        ("delete from ledger where generation = 2", "Entry 2 of the ledger of m has generation 3"),
        ("delete from ledger where generation = 3", "its ledger leads to"),
        ("update deployment set champion = 1", "The deployment of m is"),
        ("update deployment set generation = 2, champion = 2", "its ledger leads to"),
        ("delete from deployment", "its ledger leads to"),
        ("""update evidence set body = body || '{"decision": "fail"}'""", "The evidence that generation 1 of m"),
    ):
        with pytest.raises(AssertionError, match="undo"), transaction() as conn:  # noqa: PT012 - all of it is undone
            conn.execute("alter table ledger disable trigger ledger_append_only")
            conn.execute("alter table evidence disable trigger evidence_stays")
            conn.execute(tamper)
            problems = deployments.verify_chain(conn, "m")
            assert any(found in problem for problem in problems), (tamper, problems)
            raise AssertionError("undo")
    assert _problems() == []
    with transaction() as conn:
        conn.execute("update deployment set generation = 2, champion = 2")
    with pytest.raises(Refused, match="The deployment of m is at generation 2, and its ledger at 3: somebody changed"):
        _do(deployments.promote, 1)


def test_what_the_ledger_needs_is_neither_deleted_nor_overwritten(database: Settings) -> None:
    """Fault 8, by a hand in the database: whatever serves, or could be rolled back to, stays as it is."""
    add_versions("m", "pass", "pass", "pass", "pass", "pass")
    _do(deployments.promote, 1)
    _do(deployments.promote, 2)
    _do(deployments.shadow, 3)
    _do(deployments.stop, "shadow")
    for number in (1, 2, 3):
        with pytest.raises(psycopg.errors.RaiseException, match=f"the ledger needs m:{number}"), transaction() as conn:
            conn.execute("delete from version where model = 'm' and number = %s", (number,))
    for number in (2, 5):
        for change in ("bundle_digest = 'sha256:x'", "manifest = '{}'", "gate = null", "number = 9"):
            with pytest.raises(psycopg.errors.RaiseException, match=f"m:{number} was not changed"), transaction() as c:
                c.execute(f"update version set {change} where model = 'm' and number = {number}")  # noqa: S608
    for statement in ("update evidence set body = '{}'", "delete from evidence", "truncate evidence cascade"):
        with pytest.raises(psycopg.errors.RaiseException), transaction() as conn:
            conn.execute(statement)
    assert _do(deployments.rollback).deployment.champion == 1
    with transaction() as conn:
        conn.execute("delete from version where model = 'm' and number = 5")  # that nothing ever rested on


@pytest.mark.parametrize("reason", ["", "  ", "a\0b", "x" * 2001, "\ud800"])
def test_a_reason_is_text(database: Settings, reason: str) -> None:
    add_versions("m", "pass")
    with pytest.raises(UsageError):
        _do(deployments.promote, 1, reason=reason)
    assert _now().generation == 0


# Each promoter keeps promoting its own two versions, by the generation that it read, until it has won so often.
PROMOTER = """
import sys
import orjson
from infra.db import transaction
from infra.errors import Conflict
from registry import deployments
process, most, wins, told = int(sys.argv[1]), int(sys.argv[2]), [], []
sys.stdin.readline()
while len(wins) < most:
    with transaction() as conn:
        seen = deployments.read(conn, "m")
    number = 2 * process if seen.champion != 2 * process else 2 * process - 1
    try:
        with transaction() as conn:
            change = deployments.promote(conn, "m", number, actor=f"os:p{process}@here", reason="race",
                                         expect_generation=seen.generation)
        wins.append(change.deployment.generation)
    except Conflict as conflict:
        told.append([seen.generation, conflict.details["generation"]])
sys.stdout.buffer.write(orjson.dumps({"wins": wins, "told": told}))
"""


def test_of_32_racing_processes_one_wins_each_generation(database: Settings) -> None:
    count, each = 32, 7  # 224 generations
    with transaction() as conn:
        for number in range(1, 2 * count + 1):
            add_version(conn, "m", number)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, str(number), str(each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for number in range(1, count + 1)
    ]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"\n")
            child.stdin.flush()
        told = [orjson.loads(out) for out, _ in [child.communicate(timeout=300) for child in children]]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    wins = Counter(generation for one in told for generation in one["wins"])
    assert wins == Counter(range(1, each * count + 1))  # every generation had one winner, none was skipped
    conflicts = [pair for one in told for pair in one["told"]]
    assert conflicts
    assert all(current > seen for seen, current in conflicts)  # each loser was told the generation that beat it
    assert _now().generation == each * count
    with transaction() as conn:
        entries = deployments.history(conn, "m")
    assert [entry.generation for entry in entries] == list(range(1, each * count + 1))
    assert all(before.at <= after.at for before, after in itertools.pairwise(entries))
    assert _problems() == []


def test_an_implicit_generation_is_the_one_read_before_waiting(database: Settings) -> None:
    """Two people promote at once without naming a generation: the second one did not see the first one's change."""
    add_versions("m", "pass", "pass")
    with db.connect() as first:
        deployments.promote(first, "m", 1, **WHO)
        result: list[object] = []

        def late() -> None:
            try:
                result.append(_do(deployments.promote, 2))
            except Conflict as conflict:
                result.append(conflict)

        thread = threading.Thread(target=late)
        thread.start()
        time.sleep(0.5)
        first.commit()
        thread.join(60)
    assert isinstance(result[0], Conflict)
    assert result[0].details["generation"] == 1
    assert _now().champion == 1


@pytest.fixture
def own_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarts]:
    """A PostgreSQL of the test's own that may be restarted, with versions 1 and 2 of a model m."""
    cluster, port = postgres.prepare(home), ports.free()
    server = Restarts(cluster=cluster, port=port, process=cluster.start(port, options=UNSYNCED))
    cluster.wait(server.process, port)
    with psycopg.connect(cluster.url(port), autocommit=True) as conn:
        conn.execute("create database tunesmith")
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", cluster.url(port))
    get_settings.cache_clear()
    migrate.migrate(get_settings().database())
    add_versions("m", "pass", "pass")
    yield server
    postgres.stop(server.process)


@dataclass
class Restarts:
    cluster: postgres.Cluster
    port: int
    process: subprocess.Popen[bytes]

    def restart(self) -> None:
        """As after a crash: it ends at once, and recovers from its log."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(60)
        self.process = self.cluster.start(self.port, options=UNSYNCED)
        self.cluster.wait(self.process, self.port)


class Stepping(psycopg.Connection[DictRow]):
    """Counts its statements, and calls `at` before the one that is numbered `stop`."""

    steps = 0
    stop = -1
    at: Callable[[], None]

    def execute(self, *arguments: Any, **named: Any) -> Any:
        if self.steps == self.stop:
            self.at()
        self.steps += 1
        return super().execute(*arguments, **named)


def test_a_database_that_restarts_between_any_two_steps_of_a_promotion(own_server: Restarts) -> None:
    """Fault 5, step by step: before the commit nothing of it is there, and the same command again does all of it."""

    def promote(number: int, stop: int, *, after_commit: bool = False) -> int:
        with Stepping.connect(get_settings().database(), row_factory=dict_row) as conn:
            conn.stop, conn.at = stop, own_server.restart
            deployments.promote(conn, "m", number, **WHO)
            if conn.steps == stop:
                own_server.restart()  # all was written and nothing committed
            conn.commit()
            if after_commit:
                own_server.restart()
            return conn.steps

    promote(1, -1)
    steps = promote(2, -1)
    assert steps >= 7
    now, number = 2, 1
    for stop in range(1, steps + 1):
        with pytest.raises(psycopg.OperationalError):
            promote(number, stop)
        assert (_now().champion, _now().generation) == (3 - number, now)
        assert _problems() == []
        assert _do(deployments.promote, number).changed is True
        now, number = now + 1, 3 - number
    with suppress(psycopg.OperationalError):  # closing it
        promote(number, -1, after_commit=True)
    assert (_now().champion, _now().generation) == (number, now + 1)
    assert _do(deployments.promote, number).changed is False
    assert _problems() == []
    with transaction() as conn:
        assert db.one(conn, "select count(*) as n from outbox")["n"] == now + 1


# Promotes 1 and 2 in turn for ever, saying each committed generation.
TOGGLER = """
import time
from infra.db import transaction
from infra.errors import TunesmithError
from registry import deployments
while True:
    try:
        with transaction() as conn:
            now = deployments.read(conn, "m").champion
            change = deployments.promote(conn, "m", 2 if now == 1 else 1, actor="os:t@here", reason="turn")
        print(change.deployment.generation, flush=True)
    except TunesmithError:
        time.sleep(0.02)
"""


def test_a_database_that_dies_in_mid_promotion_leaves_old_or_new_entirely(own_server: Restarts) -> None:
    """Three immediate shutdowns under promotions: what was told as done is there, and nothing is half there."""
    child = subprocess.Popen(
        [sys.executable, "-c", TOGGLER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    told = 0
    try:
        assert child.stdout is not None
        for _ in range(3):
            for _ in range(20):
                told = int(child.stdout.readline())
            own_server.restart()
            told = max(told, int(child.stdout.readline()))
        child.kill()
        told = max([told, *(int(line) for line in child.stdout.read().split())])
        now = _now()
        assert now.generation - told in (0, 1)  # told is done; at most one more was done and not yet told
        assert _problems() == []
        again = _do(deployments.promote, now.champion)  # repeating the command is safe
        assert again.changed is False
        with transaction() as conn:
            assert db.one(conn, "select count(*) as n from outbox")["n"] == now.generation
    finally:
        child.kill()
        child.communicate()
