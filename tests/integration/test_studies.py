"""Rung jobs on a real database: who may take them, who may write, and what becomes of those whose worker is gone."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.db import transaction
from infra.errors import Conflict, NotFound
from infra.settings import Settings
from pipelines import runs
from pipelines.tuning.crew import Crew
from pipelines.tuning.worker import _next, name_of
from registry import leases, studies
from registry.studies import Job


@pytest.fixture
def study(database: Settings) -> str:
    with transaction() as conn:
        conn.execute("insert into model (name) values ('m')")
        studies.create(conn, "s", "m", {"trials": 3})
        for trial in range(3):
            put_up(conn, trial)
    return "s"


def put_up(conn: object, trial: int, rung: int = 0, pack: int | None = None) -> None:
    studies.add_job(
        conn, "s", trial=trial, rung=rung, trial_id=trial + 10, params={"r": trial}, steps=5, checkpoint=None, pack=pack
    )  # type: ignore[arg-type]


def take_pack(worker: str) -> list[Job]:
    with transaction() as conn:
        return studies.claim(conn, "s", worker)


def take(worker: str) -> Job | None:
    return next(iter(take_pack(worker)), None)


def taken(worker: str) -> Job:
    job = take(worker)
    assert job is not None
    return job


def finish(job: Job, value: float = 1.0) -> None:
    with transaction() as conn:
        studies.finish(conn, job, value=value, curve=[(1, 2.0)], checkpoint="c", tokens=10, seconds=1.0,
                       adapter_parameters=8)  # fmt: skip


def reap() -> None:
    with transaction() as conn:
        studies.reap(conn, "s")


def job(trial: int, rung: int = 0) -> Job:
    with transaction() as conn:
        return next(j for j in studies.jobs(conn, "s") if (j.trial, j.rung) == (trial, rung))


def let_expire(trial: int) -> None:
    with transaction() as conn:
        conn.execute("update rung_job set lease_until = now() - interval '1 hour' where trial = %s", [trial])


def test_racing_workers_get_one_job_each(study: str) -> None:
    with transaction() as conn:
        for trial in range(3, 40):
            put_up(conn, trial)
    with ThreadPoolExecutor(8) as pool:
        got = [j for j in pool.map(lambda n: take(f"w{n}"), range(60)) if j is not None]
    assert sorted(j.trial for j in got) == list(range(40))
    assert {(j.token, j.attempts, j.state) for j in got} == {(1, 1, "running")}


def test_a_pack_is_taken_whole_by_one_of_many_workers(study: str) -> None:
    with transaction() as conn:
        for trial in range(3, 43):
            put_up(conn, trial, pack=3 + (trial - 3) // 8 * 8)
    with ThreadPoolExecutor(8) as pool:
        got = [jobs for jobs in pool.map(lambda n: take_pack(f"w{n}"), range(30)) if jobs]
    assert sorted([j.trial for j in jobs] for jobs in got) == [
        [0], [1], [2], *([*range(first, first + 8)] for first in range(3, 43, 8))
    ]  # fmt: skip
    assert all(len({j.worker for j in jobs}) == 1 for jobs in got)


def test_a_pack_that_does_not_fit_waits_again_one_by_one(study: str) -> None:
    with transaction() as conn:
        for trial in (3, 4, 5):
            put_up(conn, trial, rung=1, pack=3)
    held = take_pack("w")
    assert [j.trial for j in held] == [3, 4, 5]
    finish(held[1])
    for j in (held[0], held[2]):
        with transaction() as conn:
            studies.unpack(conn, j)
    with pytest.raises(Conflict):
        finish(held[0])
    assert [[(j.trial, j.pack, j.attempts) for j in take_pack("v")] for _ in range(2)] == [[(3, 3, 1)], [(5, 5, 1)]]


def test_what_was_measured_first_holds(study: str) -> None:
    with transaction() as conn:
        studies.measured(conn, "s", 4)
        studies.measured(conn, "s", 8)
        assert studies.get(conn, "s")["adapters_per_pass"] == 4


def test_higher_rungs_come_first_and_a_rung_is_put_up_once(study: str) -> None:
    with transaction() as conn:
        put_up(conn, 2, rung=1)
        put_up(conn, 2, rung=1)
        assert len(studies.jobs(conn, "s")) == 4
    assert [(j.trial, j.rung) for j in (taken("w"), taken("w"))] == [(2, 1), (0, 0)]


def test_whoever_ends_a_rung_leaves_lower_ones_alone_until_it_is_judged(study: str) -> None:
    with transaction() as conn:
        put_up(conn, 0, rung=1)
        put_up(conn, 1, rung=1)
    first, second = taken("a"), taken("b")
    assert (first.rung, second.rung) == (1, 1)
    finish(first)
    following = _next("s", (), above=1)  # the other one is not through yet, and nothing to wait for
    assert following is not None
    assert [(j.trial, j.rung) for j in following] == [(0, 0)]
    finish(second)
    assert _next("s", (), above=1) == []
    with transaction() as conn:
        put_up(conn, 1, rung=2)
    best = _next("s", (), above=1)
    assert best is not None
    assert [(j.trial, j.rung) for j in best] == [(1, 2)]
    rest = _next("s", (), above=-1)
    assert rest is not None
    assert [(j.trial, j.rung) for j in rest] == [(1, 0)]


def test_a_stale_token_writes_nothing(study: str) -> None:
    """Fault 3: a worker that was taken for dead wakes up."""
    sleeper = taken("sleeper")
    let_expire(sleeper.trial)
    reap()
    successor = taken("successor")
    assert (successor.trial, successor.token, successor.attempts) == (sleeper.trial, 2, 2)
    for write in (
        lambda: finish(sleeper, 0.0),
        lambda: _fail(sleeper),
        lambda: _renew(sleeper),
    ):
        with pytest.raises(Conflict, match="went to another worker"):
            write()
    assert job(0) == successor
    finish(successor, 2.5)
    assert (job(0).state, job(0).value) == ("done", 2.5)
    with pytest.raises(Conflict):  # done is done, for its own worker too
        finish(successor, 0.0)
    assert job(0).value == 2.5


def _fail(held: Job) -> None:
    with transaction() as conn:
        studies.fail(conn, held, "woke up late")


def _renew(held: Job) -> None:
    with transaction() as conn:
        studies.renew(conn, held)


def test_leases_follow_the_databases_clock(study: str) -> None:
    """Fault 24: a worker's own clock is never asked. A lease that ran out unnoticed can still be renewed."""
    held = taken("w")
    with transaction() as conn:
        row = conn.execute("select lease_until - now() as left from rung_job where trial = 0").fetchone()
    assert row is not None
    assert 25 < row["left"].total_seconds() <= studies.LEASE_SECONDS
    let_expire(0)
    assert taken("other").trial == 1  # workers take nothing from each other
    _renew(held)
    reap()
    assert job(0).state == "running"


def test_a_job_whose_worker_died_is_tried_again_and_then_fails_with_its_cause(study: str) -> None:
    for attempt in (1, 2, 3):
        died = taken(f"host:{attempt}")
        assert (died.trial, died.attempts) == (0, attempt)
        with transaction() as conn:
            studies.bury(conn, "s", f"host:{attempt}")
            studies.bury(conn, "s", "host:7")
        reap()
    assert job(0).state == "failed"
    assert job(0).error == "its worker died 3 times, as it does where memory runs out; last host:3"
    assert taken("w").trial == 1


def test_a_job_whose_workers_went_with_their_machine_stays_in_its_pack_and_fails_late(study: str) -> None:
    with transaction() as conn:
        for trial in (3, 4):
            put_up(conn, trial, rung=1, pack=3)
    for attempt in range(1, studies.MOST_ATTEMPTS // 2 + 1):
        assert [(j.trial, j.attempts) for j in take_pack("w")] == [(3, attempt), (4, attempt)]
        for trial in (3, 4):
            let_expire(trial)
        reap()
    for attempt in range(studies.MOST_ATTEMPTS // 2 + 1, studies.MOST_ATTEMPTS + 1):
        assert [(j.trial, j.attempts) for j in take_pack("host:1")] == [(3, attempt)]  # who takes the machine with it
        let_expire(3)
        reap()
    assert job(3, 1).state == "failed"
    assert job(3, 1).error == "its workers were gone 10 times, perhaps with their machines; last host:1"
    assert [j.trial for j in take_pack("w")] == [4]
    finish(job(4, 1))


def test_a_dead_worker_is_not_taken_for_one_of_another_container(study: str) -> None:
    """Which may have the same host's name and the same process ids."""
    one, other = Crew("s", 1), Crew("s", 1)
    held = taken(name_of(one.mark, 7))
    with transaction() as conn:
        studies.bury(conn, "s", name_of(other.mark, 7))
        studies.give_back(conn, "s", name_of(other.mark, 7))
    finish(held)


def test_a_curve_is_read_when_it_is_asked_for(study: str) -> None:
    finish(taken("w"))
    done, other = job(0), job(1)
    with transaction() as conn:
        assert [j.curve for j in studies.jobs(conn, "s")] == [None] * 3
        assert [j.curve for j in studies.jobs(conn, "s", curves=True)] == [[[1, 2.0]], None, None]
        assert studies.curves(conn, "s", [done, other]) == {(0, 0): [[1, 2.0]], (1, 0): []}


def test_a_place_counts_what_was_drawn(study: str) -> None:
    with transaction() as conn:
        for trial, clone_of in ((3, 1), (4, None), (5, 3), (6, 4)):
            studies.add_job(
                conn, "s", trial=trial, rung=0, trial_id=trial, params={}, steps=5, checkpoint=None, clone_of=clone_of
            )
        assert studies.places(conn, "s") == {0: 0, 1: 1, 2: 2, 3: 1, 4: 3, 5: 1, 6: 3}


def test_a_study_in_which_nothing_succeeded_is_tried_anew(study: str) -> None:
    for _ in range(3):
        with transaction() as conn:
            studies.fail(conn, taken("w"), "no space left")
    with transaction() as conn:
        studies.end(conn, "s", state="failed", stopped_by="trials", best=None)
        studies.resume(conn, "s")
        assert [(j.state, j.attempts, j.error) for j in studies.jobs(conn, "s")] == [("waiting", 0, None)] * 3
    assert taken("w").attempts == 1


def test_members_of_a_pack_whose_workers_died_twice_are_tried_alone(study: str) -> None:
    with transaction() as conn:
        for trial in (3, 4):
            put_up(conn, trial, rung=1, pack=3)
    for attempt in (1, 2):
        assert [(j.trial, j.attempts) for j in take_pack(f"host:{attempt}")] == [(3, attempt), (4, attempt)]
        with transaction() as conn:
            studies.bury(conn, "s", f"host:{attempt}")
        reap()
    assert [[j.trial for j in take_pack("w")] for _ in range(2)] == [[3], [4]]


def test_a_job_that_was_given_back_has_lost_no_attempt(study: str) -> None:
    """Ctrl-C, as often as it comes, is no fault of the trial's."""
    for token in range(1, 6):
        held = taken("host:1")
        assert (held.trial, held.attempts, held.token) == (0, 1, token)
        with transaction() as conn:
            studies.give_back(conn, "s", "host:1")
        reap()
        assert job(0).state == "waiting"
        with pytest.raises(Conflict):
            finish(held)


def test_a_stopped_study_gives_no_work_and_a_resumed_one_forgets_its_end(study: str) -> None:
    with transaction() as conn:
        studies.stop(conn, "s")
    assert take("w") is None
    with transaction() as conn:
        studies.end(conn, "s", state="stopped", stopped_by="user", best={"trial": 1})
        with pytest.raises(Conflict, match="stopped already"):
            studies.stop(conn, "s")
    with transaction() as conn:
        studies.resume(conn, "s")
        row = studies.get(conn, "s")
    assert (row["state"], row["stopped_by"], row["best"]) == ("running", None, None)
    assert taken("w").trial == 0
    with transaction() as conn:
        with pytest.raises(Conflict, match="s is running"):
            studies.resume(conn, "s")
        with pytest.raises(NotFound, match="no study nobody"):
            studies.get(conn, "nobody")
    with transaction() as conn:
        again = studies.create(conn, "s", "m", {"trials": 99})
        listed = studies.list_studies(conn)
    assert again["spec"] == {"trials": 3}
    assert [(s["name"], s["trials"], s["rungs_open"]) for s in listed] == [("s", 3, 3)]


def test_a_study_that_used_up_its_budget_is_not_resumed_to_stop_again(study: str) -> None:
    with transaction() as conn:
        studies.stop(conn, "s", by="max_minutes")
    spent = pytest.raises(Conflict, match="The study s used up its max_minutes, and would stop again")
    with spent as refused, transaction() as conn:
        studies.resume(conn, "s")
    assert "Raise tuning.budget in the file" in refused.value.hint


def test_variants_are_tried_before_what_was_drawn(study: str) -> None:
    with transaction() as conn:
        put_up(conn, 0, rung=1)
        studies.add_job(conn, "s", trial=9, rung=0, trial_id=19, params={"r": 9}, steps=5, checkpoint=None, clone_of=0)
    assert [(j.trial, j.rung) for j in (taken("w") for _ in range(3))] == [(9, 0), (0, 1), (0, 0)]


def test_a_stopped_study_whose_run_went_on_is_searched_again_or_refused(study: str) -> None:
    run = uuid.uuid4()

    def kept() -> list[str]:
        return [row["name"] for row in conn.execute("select name from stage order by name")]

    with transaction() as conn:
        conn.execute(
            "insert into run (id, model, kind, state, fingerprint, config, config_path, token, study)"
            " values (%s, 'm', 'train', 'running', 'f', '{}', 'm.yaml', 1, 's')",
            (run,),
        )
        for name in ("prepare", "search", "evaluate"):
            conn.execute("insert into stage (run_id, name, output, seconds) values (%s, %s, '{}', 1)", (run, name))
        lease = leases.acquire(conn, "run:m", "someone", 60)
        conn.execute("update run set token = %s", (lease.token,))
        studies.stop(conn, "s")
        with pytest.raises(Conflict, match="its run is at work on a version"):
            studies.resume(conn, "s")
        conn.execute("delete from stage where name in ('search', 'evaluate')")  # it has not kept yet what was found
        studies.end(conn, "s", state="stopped", stopped_by="user", best={"trial": 1})
        with pytest.raises(Conflict, match="its run is at work on a version"):
            studies.resume(conn, "s")
        leases.release(conn, lease)
    with transaction() as conn:
        studies.resume(conn, "s")
        assert kept() == ["prepare"]
        assert studies.get(conn, "s")["state"] == "running"


def test_a_search_begins_with_what_came_furthest_in_the_last_ones(study: str) -> None:
    with transaction() as conn:
        for name, base in (("old", "b"), ("new", "b"), ("other", "c")):
            studies.create(conn, name, "m", {"base": base})
            for trial, (rung, value) in enumerate(((0, 0.1), (1, 0.5), (1, 0.4), (0, 0.9))):
                studies.add_job(
                    conn, name, trial=trial, rung=rung, trial_id=trial, params={"of": name, "n": trial}, steps=5,
                    checkpoint=None,
                )  # fmt: skip
                conn.execute(
                    "update rung_job set state = 'done', value = %s where study = %s and trial = %s",
                    (value, name, trial),
                )
            studies.end(conn, name, state="completed", stopped_by="trials", best={"params": {"of": name, "n": 2}})
            conn.execute(
                "update study set created_at = now() - %s * interval '1 day' where name = %s",
                ({"old": 3, "new": 2, "other": 1}[name], name),
            )
        asked = {"model": "m", "study": "s", "base": "b", "studies": 3, "each": 2, "most": 5}
        found = [row["params"] for row in conn.execute(runs.SQL["best_params"], asked)]
    assert [(params["of"], params["n"]) for params in found] == [
        ("new", 2), ("old", 2), ("new", 1), ("old", 1), ("other", 2)
    ]  # fmt: skip
