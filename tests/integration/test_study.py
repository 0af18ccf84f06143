"""The search on builtin:tiny with real workers: what it does, and what it outlives."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from click.testing import CliRunner

from infra import storage
from infra.db import transaction
from infra.errors import Conflict, TunesmithError, UsageError
from pipelines import plans, runs, stages
from pipelines.cli import tunesmith
from pipelines.tuning.methods import fixed_by
from pipelines.tuning.mirror import Mirror, open_store
from pipelines.tuning.search import search
from pipelines.tuning.space import check_parts
from pipelines.tuning.spec import StudySpec
from registry import datasets, leases, studies
from registry.bases import Base
from registry.datasets import Row, make_row

SPACE: dict[str, Any] = {
    "r": [4, 8],
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "target_modules": ["attention"],
    "per_device_train_batch_size": 8,
}


def rows(count: int, start: int = 0) -> list[Row]:
    words = ["red", "green", "blue", "black", "white"]
    turns = [
        ({"role": "user", "content": f"colour {n}"}, {"role": "assistant", "content": words[n % 5]})
        for n in range(start, start + count)
    ]
    return [make_row(list(pair), source="train", group=str(n)) for n, pair in enumerate(turns)]


@pytest.fixture
def spec(tiny_base: Base) -> StudySpec:
    """Four trials of at most 72 steps, in three rungs; one worker, so that the order is one."""
    splits = {"train": rows(80), "validation": rows(16, 100), "test": rows(4, 200)}
    kept = datasets.keep(splits, counts={}, sources=[], recipe={})
    with transaction() as conn:
        conn.execute("insert into model (name) values ('m')")
    return StudySpec(
        study="m-1", model="m", base=tiny_base.digest, dataset=kept.digest, system=None, max_tokens=64, trials=4,
        rungs=(8, 24, 72), reduction=3, space=SPACE, workers=1, adapters_per_pass=2,
    )  # fmt: skip


def jobs(study: str = "m-1") -> list[studies.Job]:
    with transaction() as conn:
        return studies.jobs(conn, study, curves=True)


def in_optuna() -> list[Any]:
    """The study's trials as Optuna's own storage has them."""
    url = f"{os.environ['TUNESMITH_DATABASE_URL'].rpartition('/')[0]}/{os.environ['TUNESMITH_DATABASE_PREFIX']}optuna"
    store = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://", 1))
    trials = optuna.load_study(study_name="m-1", storage=store).trials
    store.engine.dispose()
    return list(trials)


def quiet(*_: object) -> None:
    pass


def until(true: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return found


def outline(study: str) -> list[tuple[object, ...]]:
    """All that must not depend on who was killed when."""
    return [(j.trial, j.rung, j.params, j.steps, j.state, j.value, j.curve, j.tokens) for j in jobs(study)]


def test_a_disturbed_search_ends_as_an_undisturbed_one(spec: StudySpec, server: Any) -> None:
    told: list[str] = []
    calm = search(spec, progress=lambda text, done, total: told.append(f"{text} {done:g}/{total:g}"))
    found = jobs()
    assert [(j.trial, j.steps) for j in found if j.rung == 0] == [(n, 8) for n in range(4)]
    assert [sum(j.rung == rung for j in found) for rung in range(3)] == [4, 2, 1]
    assert all(j.state == "done" and j.attempts == 1 for j in found)
    for j in found:  # each step of each rung once
        begun = spec.rungs[j.rung - 1] if j.rung else 0
        assert [step for step, _ in j.curve or []] == list(range(begun + 1, j.steps + 1))
    last = found[[j.rung for j in found].index(2)]
    assert (calm.trial, calm.value, calm.steps, calm.stopped_by) == (last.trial, last.value, 72, "trials")
    assert (calm.trials, calm.pruned, calm.failed) == (4, 3, 0)
    assert told[-1].startswith("best loss")
    assert any(re.search(r"about \d+ min left", words) for words in told)
    assert last.value is not None
    assert last.curve is not None
    assert last.value < last.curve[0][1]  # it learned
    assert search(spec, progress=quiet) == calm  # over is over

    again = replace(spec, study="m-2")
    coordinator = coordinate(again)
    try:
        victim = until(lambda: next((j for j in jobs("m-2") if j.state == "running" and j.rung == 0), None))
        worker = int(str(victim.worker).rpartition(":")[2])
        os.kill(worker, signal.SIGKILL)
        until(lambda: any(j.rung == 0 and j.state == "done" for j in jobs("m-2")))
        with server.admin() as conn:  # as an immediate restart of the database does to connections
            prefix = os.environ["TUNESMITH_DATABASE_PREFIX"]
            conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname like %s", (f"{prefix}%",)
            )
        until(lambda: any(j.rung == 1 for j in jobs("m-2")))
    finally:
        workers = psutil.Process(coordinator.pid).children()
        coordinator.kill()
        coordinator.wait()
    outcome = search(again, progress=quiet)
    psutil.wait_procs(workers, timeout=120)
    assert not any(p.is_running() for p in workers)  # those of a dead coordinator end by themselves
    assert outline("m-2") == outline("m-1")
    assert [j.attempts for j in jobs("m-2") if j.trial == victim.trial and j.rung == 0] == [2]
    assert sum(j.attempts for j in jobs("m-2")) <= 9  # the one that was killed, perhaps the one of the outage
    assert (outcome.trial, outcome.params, outcome.value) == (calm.trial, calm.params, calm.value)


def test_a_space_with_parts_that_the_base_has_not_is_refused(tiny_base: Base) -> None:
    whole = {"target_modules": ["attention", ["q_proj", "self_attn.v_proj"]], "layers_to_transform": ["all", [0, 1]]}
    check_parts(whole, tiny_base)
    with pytest.raises(UsageError, match="target_modules: builtin:tiny has no module 'q_projj'") as error:
        check_parts(whole | {"target_modules": [["q_projj"]]}, tiny_base)
    assert "q_proj" in str(error.value.hint)
    with pytest.raises(UsageError, match="has no layer 2; it has 0 to 1"):
        check_parts(whole | {"layers_to_transform": ["top_half", [1, 2]]}, tiny_base)


def damage(digest: str) -> None:
    """Change some bytes of a checkpoint's adapter, as a bad disk does."""
    [path] = (storage.where("checkpoint", digest) / "adapter").glob("*.safetensors")
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 400] = bytes(byte ^ 0x5A for byte in whole[middle : middle + 400])
    path.write_bytes(whole)


def test_what_would_go_on_from_a_damaged_checkpoint_begins_anew(spec: StudySpec) -> None:
    # The last rung is not over before its worker is killed; and who trains in a pack rounds otherwise than alone
    spec = replace(spec, rungs=(8, 24, 240), adapters_per_pass=1)
    calm = search(spec, progress=quiet)
    again = replace(spec, study="m-2")
    coordinator = coordinate(again)
    try:
        victim = until(lambda: next((j for j in jobs("m-2") if j.state == "running" and j.rung == 2), None))
    finally:
        kill_all(coordinator)
    assert victim.checkpoint is not None
    damage(victim.checkpoint)
    outcome = search(again, progress=quiet)
    assert [row[:-1] for row in outline("m-2")] == [row[:-1] for row in outline("m-1")]  # it was more tokens
    assert (outcome.trial, outcome.steps, outcome.value) == (calm.trial, calm.steps, calm.value)


def test_a_damaged_winner_does_not_win(spec: StudySpec) -> None:
    short = replace(spec, trials=3, rungs=(8,))

    def end_again() -> None:
        with transaction() as conn:
            conn.execute("update study set state = 'running', best = null, stopped_by = null")

    first = search(short, progress=quiet)
    before = {j.trial: j for j in jobs()}
    damage(str(before[first.trial].checkpoint))
    end_again()
    second = search(short, progress=quiet)
    assert second.trial != first.trial
    assert second.value == min(j.value or math.inf for j in before.values() if j.trial != first.trial)
    spoiled = {j.trial: j for j in jobs()}[first.trial]
    assert (spoiled.state, spoiled.error) == ("failed", "its checkpoint is damaged or gone")

    for j in before.values():
        shutil.rmtree(storage.where("checkpoint", str(j.checkpoint)))
    end_again()
    with pytest.raises(TunesmithError, match="No trial of m-1 succeeded: its checkpoint is damaged or gone"):
        search(short, progress=quiet)
    third = search(short, progress=quiet)  # which tries anew what failed
    assert third.trial == first.trial
    assert {j.trial: j.params for j in jobs()} == {trial: j.params for trial, j in before.items()}
    assert all(storage.sound("checkpoint", str(j.checkpoint)) for j in jobs())


def coordinate(spec: StudySpec) -> subprocess.Popen[bytes]:
    """The search in a process of its own."""
    return subprocess.Popen(coordinator_of(spec))


def kill_all(coordinator: subprocess.Popen[bytes]) -> None:
    """End a coordinator and its workers at once, and be sure that they are gone."""
    processes = [psutil.Process(coordinator.pid), *psutil.Process(coordinator.pid).children()]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    coordinator.wait()
    psutil.wait_procs(processes[1:], timeout=120)


def coordinator_of(spec: StudySpec) -> list[str]:
    """Its command."""
    code = (
        "import json, sys; from pipelines.tuning.search import search; from pipelines.tuning.spec import StudySpec\n"
        "search(StudySpec.from_json(json.loads(sys.argv[1])), progress=lambda *_: None)"
    )
    return [sys.executable, "-c", code, json.dumps(spec.to_json())]


def test_a_search_with_two_objectives_tells_the_pareto_set_and_picks_by_the_rule(spec: StudySpec) -> None:
    both = replace(
        spec, trials=3, rungs=(4,), space=SPACE | {"target_modules": ["attention", "all-linear"]},
        objectives=["loss", "latency_ms"], pick={"within": 10.0, "then": "latency_ms"},
    )  # fmt: skip
    best = search(both, progress=quiet)
    found = {j.trial: j for j in jobs()}
    assert all(j.latency_ms is not None and 0 < j.latency_ms < 1000 for j in found.values())
    quickest = min(found.values(), key=lambda j: (j.latency_ms or 0.0, j.value))
    assert best.trial == quickest.trial  # any loss is within ten times the best one
    front = {point["trial"]: point for point in best.pareto}
    assert quickest.trial in front
    assert min(found.values(), key=lambda j: j.value or 0.0).trial in front
    assert all(point["latency_ms"] == found[trial].latency_ms for trial, point in front.items())
    shown = CliRunner().invoke(tunesmith, ["study", "show", "m-1"]).stdout
    assert re.search(rf"trial {best.trial}, 4 steps: loss [\d.]+, latency_ms [\d.]+  <- picked", shown), shown
    assert shown.count("<- picked") == 1
    with transaction() as conn:
        conn.execute("update study set state = 'running', best = null")
    listed = CliRunner().invoke(tunesmith, ["study", "list"]).stdout
    assert re.search(rf"interrupted .* {min(j.value or math.inf for j in found.values()):.4f} ", listed), listed


@pytest.mark.slow
def test_many_groups_with_draws_that_learn_end_the_same_however_disturbed(spec: StudySpec, home: Path) -> None:
    """Seven groups, the last ones drawn by TPE's model of what the first showed; with one worker the killed and resumed
    study is the same, trial for trial, and with two nothing is lost or done twice."""
    many = replace(spec, trials=21, rungs=(6, 18))
    calm = search(many, progress=quiet)
    found = jobs()
    assert sorted({j.trial for j in found}) == list(range(21))
    assert len({json.dumps(j.params, sort_keys=True) for j in found}) == 21
    again = replace(many, study="m-2")
    for rung, done in ((1, 1), (0, 9), (1, 5)):  # a worker and its coordinator, each time at another place
        coordinator = coordinate(again)
        try:
            victim = until(
                lambda rung=rung, done=done: next(
                    (
                        j
                        for j in jobs("m-2")
                        if j.state == "running"
                        and j.rung == rung
                        and sum(o.state == "done" and o.rung == rung for o in jobs("m-2")) >= done
                    ),
                    None,
                )
            )
            os.kill(int(str(victim.worker).rpartition(":")[2]), signal.SIGKILL)
        finally:
            kill_all(coordinator)
    outcome = search(again, progress=quiet)
    assert outline("m-2") == outline("m-1")
    assert (outcome.trial, outcome.value) == (calm.trial, calm.value)

    for log in (home / "logs").glob("worker-*.log"):
        log.unlink()
    two = replace(many, study="m-3", workers=2)
    coordinator = coordinate(two)
    try:
        victim = until(lambda: next((j for j in jobs("m-3") if j.state == "running" and j.rung == 1), None))
        os.kill(int(str(victim.worker).rpartition(":")[2]), signal.SIGKILL)
        coordinator.wait(600)
    finally:
        coordinator.kill()
        coordinator.wait()
    done = jobs("m-3")
    assert sorted(j.trial for j in done if j.rung == 0) == list(range(21))
    assert all(j.state == "done" for j in done)
    for j in done:
        begun = many.rungs[j.rung - 1] if j.rung else 0
        assert [step for step, _ in j.curve or []] == list(range(begun + 1, j.steps + 1))
    # A worker that had nothing left to do in a group began the next one
    begun_at: dict[int, datetime] = {}
    for log in (home / "logs").glob("worker-*.log"):
        for line in log.read_text().splitlines():
            if found_line := re.fullmatch(r"(\S+) .*trials (\d+).*: to step 6", line):
                group = int(found_line[2]) // 3
                when = datetime.fromisoformat(found_line[1].replace("Z", "+00:00"))
                begun_at[group] = min(begun_at.get(group, when), when)
    ended = {group: max(j.updated_at for j in done if j.rung == 1 and j.trial // 3 == group) for group in range(7)}
    assert any(begun_at[group + 1] < ended[group] for group in range(6))
    assert {(j.trial, j.rung) for j in done if j.attempts > 1} <= {
        (j.trial, j.rung) for j in done if j.pack == victim.pack and j.rung == victim.rung
    }


def test_a_running_search_is_stopped_and_goes_on_by_command(spec: StudySpec) -> None:
    run = CliRunner()
    many = replace(spec, trials=9, rungs=(8, 24))
    coordinator = coordinate(many)
    try:
        until(lambda: any(j.state == "done" for j in jobs()))
        listed = json.loads(run.invoke(tunesmith, ["study", "list", "--json"]).stdout)["studies"]
        assert [(s["name"], s["state"]) for s in listed] == [("m-1", "running")]
        assert run.invoke(tunesmith, ["study", "stop", "m-1"]).exit_code == 0
        assert coordinator.wait(120) == 0
    finally:
        coordinator.kill()
        coordinator.wait()
    before = {(j.trial, j.rung) for j in jobs() if j.state == "done"}
    stopped = search(many, progress=quiet)
    assert stopped.stopped_by == "user"
    left = {t.number for t in in_optuna() if t.state.name == "PRUNED"}
    assert left
    assert stopped.value == min(j.value for j in jobs() if j.value is not None)
    assert run.invoke(tunesmith, ["study", "resume", "m-1"]).exit_code == 0
    whole = search(many, progress=quiet)
    assert (whole.trials, whole.stopped_by) == (9, "trials")
    found = jobs()
    assert before < {(j.trial, j.rung) for j in found}
    assert all(j.state == "done" for j in found)
    told = in_optuna()
    for trial in {j.trial for j in found}:  # Optuna has what each came to, also of those that it had as over
        course = {j.steps: j.value for j in found if j.trial == trial}
        state = "COMPLETE" if 24 in course else "PRUNED"
        own = [t for t in told if t.number == trial or t.user_attrs.get("whole") == trial]
        assert (own[-1].state.name, own[-1].intermediate_values) == (state, course)
        assert len(own) == 1 or trial in left
    assert search(many, progress=quiet) == whole
    assert len(in_optuna()) == len(told)


@pytest.mark.slow
def test_a_worker_that_slept_through_its_lease_writes_nothing(spec: StudySpec) -> None:
    """Fault 3, of a search worker: another one has its trial when it wakes up."""
    calm = replace(spec, trials=2, rungs=(8, 24), adapters_per_pass=1)
    search(calm, progress=quiet)
    again = replace(calm, study="m-2")
    coordinator = coordinate(again)
    sleeper = 0
    try:
        victim = until(lambda: next((j for j in jobs("m-2") if j.state == "running"), None))
        sleeper = int(str(victim.worker).rpartition(":")[2])
        os.kill(sleeper, signal.SIGSTOP)
        guest = subprocess.Popen([sys.executable, "-m", "pipelines.cli", "worker", "--study", "m-2"])
        place = victim.trial, victim.rung
        until(lambda: next(j for j in jobs("m-2") if (j.trial, j.rung) == place).attempts == 2)
        os.kill(sleeper, signal.SIGCONT)
        assert coordinator.wait(300) == 0
        assert guest.wait(60) == 0
    finally:
        for pid in (sleeper, coordinator.pid):
            with suppress(ProcessLookupError):
                os.kill(pid or coordinator.pid, signal.SIGKILL)
        coordinator.wait()
    assert outline("m-2") == outline("m-1")
    assert next(j for j in jobs("m-2") if (j.trial, j.rung) == place).token > victim.token


@pytest.mark.slow
def test_a_new_coordinator_takes_nothing_from_workers_that_live(spec: StudySpec) -> None:
    """After an outage in which nobody could renew, a search is gone on with by another process."""
    first = coordinate(spec)
    worker = 0
    try:
        victim = until(lambda: next((j for j in jobs() if j.state == "running"), None))
        worker = int(str(victim.worker).rpartition(":")[2])
        os.kill(worker, signal.SIGSTOP)
        first.kill()
        first.wait()
        with transaction() as conn:
            conn.execute("update rung_job set lease_until = now() - interval '1 second' where state = 'running'")
            counted = studies.get(conn, "m-1")["seconds"]
        second = coordinate(spec)

        def at_work() -> bool:
            with transaction() as conn:
                return bool(studies.get(conn, "m-1")["seconds"] > counted)

        until(at_work)
        os.kill(worker, signal.SIGCONT)
        assert second.wait(300) == 0
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker or first.pid, signal.SIGKILL)
        first.kill()
    assert all((j.state, j.attempts) == ("done", 1) for j in jobs())


@pytest.mark.slow
def test_a_worker_whose_clock_is_an_hour_off_takes_nothing_from_the_others(spec: StudySpec) -> None:
    """Fault 24, of a search worker beside one with the right time."""
    many = replace(spec, trials=9, rungs=(40, 120), adapters_per_pass=1)
    with transaction() as conn:
        studies.create(conn, many.study, many.model, many.to_json())
    guests = [
        subprocess.Popen(
            [
                sys.executable, "-c",
                f"import time; real = time.time; time.time = lambda: real() + {offset}\n"
                "from pipelines.tuning import worker; worker.work('m-1')",
            ]
        )
        for offset in (3600, -3600)
    ]  # fmt: skip
    best = search(many, progress=quiet)
    for guest in guests:
        assert guest.wait(60) == 0
    found = jobs()
    assert sorted(j.trial for j in found if j.rung == 0) == list(range(9))
    assert all(j.state == "done" and j.attempts == 1 for j in found)
    assert {int(str(j.worker).rpartition(":")[2]) for j in found} & {guest.pid for guest in guests}
    assert best.value == min(j.value for j in found if j.value is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="what processes share is read from /proc")
def test_workers_share_the_pages_of_one_base(spec: StudySpec) -> None:
    """And ask for an end of their own before PostgreSQL's, should memory run out."""
    coordinator = coordinate(replace(spec, workers=2, rungs=(400,), adapters_per_pass=1))

    def at_work() -> set[int]:
        return {int(str(j.worker).rpartition(":")[2]) for j in jobs() if j.state == "running"}

    try:
        until(lambda: len(at_work()) == 2)
        for pid in at_work():
            shared = private = 0
            mine = False
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                if "-" in line.split(" ")[0]:
                    mine = line.endswith("/model.safetensors")
                elif mine and line.startswith("Shared_"):
                    shared += int(line.split()[1])
                elif mine and line.startswith("Private_"):
                    private += int(line.split()[1])
            assert shared > 1000  # of the 2.4 MB of builtin:tiny
            assert private == 0
            assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"
    finally:
        workers = psutil.Process(coordinator.pid).children()
        coordinator.kill()
        coordinator.wait()
        for worker in workers:
            worker.kill()
        psutil.wait_procs(workers, timeout=60)


def test_broken_and_repeated_trials_do_not_stop_the_others(spec: StudySpec) -> None:
    space = SPACE | {"learning_rate": [1e-3, 1e30]}
    best = search(replace(spec, space=space, trials=6, rungs=(8,)), progress=quiet)
    found = jobs()
    assert len(found) == best.trials == 4  # the space has no more, and none is run twice
    assert len({(j.params["r"], j.params["learning_rate"]) for j in found}) == 4
    broken = [j for j in found if j.params["learning_rate"] > 1]
    assert {j.state for j in broken} == {"failed"}
    assert all("the loss became" in str(j.error) or "the gradient became" in str(j.error) for j in broken)
    assert all(j.attempts == 1 for j in found)
    assert (best.failed, best.pruned, best.params["learning_rate"]) == (2, 0, 1e-3)
    assert best.stopped_by == "space"
    assert len(in_optuna()) == 4, "and Optuna was asked for no more"
    assert all(j.seconds and j.tokens for j in broken), "a budget counts what failed too"


def test_an_error_of_one_of_a_pack_is_its_own(spec: StudySpec) -> None:
    space = SPACE | {"r": 4, "learning_rate": 1e-3, "target_modules": [["q_proj"], ["no_such_proj"]]}
    best = search(replace(spec, space=space, trials=2, rungs=(8,)), progress=quiet)
    bad, good = sorted(jobs(), key=lambda j: j.state == "done")
    assert (good.state, good.params["target_modules"]) == ("done", ["q_proj"])
    assert (bad.state, bad.params["target_modules"]) == ("failed", ["no_such_proj"])
    assert "no_such_proj" in str(bad.error)
    assert (best.trial, best.failed) == (good.trial, 1)


def test_a_search_without_a_success_says_why(spec: StudySpec) -> None:
    with pytest.raises(
        TunesmithError, match=r"^No trial of m-1 succeeded: the (loss|gradient) became nan at"
    ) as raised:
        search(replace(spec, space=SPACE | {"learning_rate": 1e30}, trials=1, rungs=(8,)), progress=quiet)
    assert "\n" not in raised.value.message
    with transaction() as conn:
        assert studies.get(conn, "m-1")["state"] == "failed"


def test_a_search_that_a_person_stops_at_once_stays_stopped_until_a_person_resumes_it(spec: StudySpec) -> None:
    small = replace(spec, trials=2, rungs=(2,))
    with transaction() as conn:
        studies.create(conn, "m-1", "m", replace(small, workers=1).to_json())
        studies.stop(conn, "m-1")
    for _ in range(2):  # also when its run is begun again
        with pytest.raises(TunesmithError, match="m-1 was stopped before any trial was measured") as raised:
            search(small, progress=quiet)
        assert "`tunesmith study resume`" in raised.value.hint
        with transaction() as conn:
            assert studies.get(conn, "m-1")["state"] == "stopped"
    with transaction() as conn:
        studies.resume(conn, "m-1")
    assert search(small, progress=quiet).trials == 2


def test_a_search_none_of_whose_trials_keeps_the_constraints_is_over(spec: StudySpec) -> None:
    small = replace(spec, trials=1, rungs=(2,), constraints={"adapter_parameters": 1.0})
    with pytest.raises(TunesmithError, match=r"^No trial keeps the constraints: adapter_parameters must be at most 1,"):
        search(small, progress=quiet)
    with transaction() as conn:
        assert studies.get(conn, "m-1")["state"] == "failed"  # so that workers go home


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("max_tokens", {"max_training_tokens": 1}),
        pytest.param("max_minutes", {"max_minutes": 1e-3, "max_usd": 1.0}, marks=pytest.mark.slow),
        pytest.param("max_usd", {"max_usd": 1e-9, "max_minutes": 60.0}, marks=pytest.mark.slow),
    ],
)
def test_a_budget_ends_a_search_with_what_it_has(spec: StudySpec, name: str, budget: dict[str, float]) -> None:
    # Rungs that take much longer than a coordinator's turn, in which no more than the next one can begin
    changed: dict[str, Any] = {"rungs": (150, 300), "adapters_per_pass": 1} | budget
    best = search(replace(spec, **changed), progress=quiet)
    found = jobs()
    assert best.stopped_by == name
    assert sum(j.state == "done" for j in found) < 3
    assert not any(j.state == "running" for j in found)
    assert best.value == min(j.value for j in found if j.value is not None)
    assert {t.state.name for t in in_optuna()} == {"PRUNED"}  # none is left running


def test_what_ended_a_search_is_kept_rather_than_reckoned_again(spec: StudySpec) -> None:
    """A person stopped it, and what was under way then used the budget up."""
    short = replace(spec, trials=6, rungs=(20,), max_training_tokens=1)
    assert search(short, progress=quiet).stopped_by == "max_tokens"
    with transaction() as conn:
        assert studies.get(conn, "m-1")["stopped_by"] == "max_tokens"
        conn.execute("update study set best = null, stopped_by = 'user'")
    assert search(short, progress=quiet).stopped_by == "user"


def test_what_a_search_that_died_as_it_ended_had_not_told_is_told_by_the_next_one(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(spec, max_training_tokens=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "leave_behind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(short, progress=quiet)
    with transaction() as conn:
        assert studies.get(conn, "m-1")["state"] == "stopped"
    assert any(t.state.name == "RUNNING" for t in in_optuna())
    assert search(short, progress=quiet).stopped_by == "max_tokens"
    assert {t.state.name for t in in_optuna()} == {"PRUNED"}
    store = open_store()
    optuna.delete_study(study_name="m-1", storage=store)  # as a person may do in optuna-dashboard
    store.engine.dispose()
    assert search(short, progress=quiet).stopped_by == "max_tokens", "the result is kept all the same"


def test_a_search_begins_with_what_was_good_before_and_from_the_adapter_it_is_given(spec: StudySpec) -> None:
    first = search(replace(spec, space=SPACE | {"r": 8}, trials=2, rungs=(40,)), progress=quiet)
    with storage.scratch("bundle") as bundle:
        shutil.copytree(first.adapter, bundle / "adapter")
        digest = storage.folder_digest(bundle)
        storage.keep("bundle", digest, bundle)
    space = SPACE | fixed_by(Path(first.adapter))
    warm = first.params | {"learning_rate": 2e-4, "target_modules": space["target_modules"][0]}
    anew = replace(spec, study="m-2", space=space, trials=2, rungs=(1,), warm_start=[warm])
    search(anew, progress=quiet)
    search(replace(anew, study="m-3", init_bundle=digest), progress=quiet)
    assert jobs("m-2")[0].params == jobs("m-3")[0].params == warm, "the first one, and no other"
    assert jobs("m-2")[1].params["learning_rate"] != warm["learning_rate"]
    begun = max(j.value for j in jobs("m-2") if j.value is not None)
    for job in jobs("m-3"):
        assert job.value is not None
        assert abs(job.value - first.value) < 0.2 * (begun - first.value), "after one small step"


def test_a_search_that_is_resumed_as_it_ends_goes_on_with_all_its_trials(spec: StudySpec) -> None:
    asked: list[str] = []

    def stop_once(*_: object) -> None:
        if not asked and any(j.state == "done" for j in jobs()):
            asked.append("stopped")
            with transaction() as conn:
                studies.stop(conn, "m-1")

    def resume(_: object) -> None:
        """In the last turn: when it looks, and then when it says how the study ended."""
        if not asked or asked[-1] == "resumed":
            return
        with transaction() as conn:
            if studies.get(conn, "m-1")["state"] != "stopped" or any(j.state == "running" for j in jobs()):
                return
            asked.append("ends" if asked[-1] == "stopped" else "resumed")
            if asked[-1] == "resumed":
                studies.resume(conn, "m-1")

    best = search(replace(spec, adapters_per_pass=1, rungs=(60, 180)), progress=stop_once, guard=resume)
    assert asked == ["stopped", "ends", "resumed"]
    assert (best.trials, best.stopped_by) == (4, "trials")
    assert [t.number for t in in_optuna()] == [0, 1, 2, 3]  # none was over, to stand there twice


def test_who_lost_the_study_decides_nothing_more_of_it(spec: StudySpec) -> None:
    """Fault 3, of a coordinator that was taken for dead: another one has the study when it wakes up."""
    lost = threading.Event()

    def guard(_: object) -> None:
        if lost.is_set():
            raise Conflict("run:m is held by another.")

    def told(*_: object) -> None:
        if any(j.state == "done" for j in jobs()):
            lost.set()

    with pytest.raises(Conflict, match="held by another"):
        search(replace(spec, adapters_per_pass=1, rungs=(150, 300)), progress=told, guard=guard)
    left = jobs()
    assert [j.rung for j in left] == [0] * 3, "neither judged nor drawn from then on"
    with transaction() as conn:
        row = studies.get(conn, "m-1")
    assert (row["state"], row["best"]) == ("running", None)
    best = search(replace(spec, adapters_per_pass=1, rungs=(150, 300)), progress=quiet)
    assert best.trials == 4


@pytest.mark.slow
def test_a_pack_whose_machine_went_three_times_ends_as_an_undisturbed_one(spec: StudySpec) -> None:
    """Nobody saw its worker die, so it is neither taken apart nor blamed: alone, its trials would round otherwise."""
    packed = replace(spec, trials=3, rungs=(150, 300))
    calm = search(packed, progress=quiet)
    again = replace(packed, study="m-2")
    for attempt in (1, 2, 3):
        coordinator = coordinate(again)
        try:
            until(lambda attempt=attempt: any(j.state == "running" and j.attempts == attempt for j in jobs("m-2")))
        finally:
            kill_all(coordinator)
        with transaction() as conn:
            conn.execute("update rung_job set lease_until = now() - interval '1 second' where state = 'running'")
    outcome = search(again, progress=quiet)
    assert outline("m-2") == outline("m-1")
    assert [(j.trial, j.rung, j.pack) for j in jobs("m-2")] == [(j.trial, j.rung, j.pack) for j in jobs("m-1")]
    assert any(j.attempts == 4 and j.pack != j.trial for j in jobs("m-2"))
    assert (outcome.trial, outcome.value) == (calm.trial, calm.value)


@pytest.mark.slow
def test_workers_that_are_killed_in_a_pack_show_whose_fault_it_was(spec: StudySpec) -> None:
    """As the kernel does where memory runs out: whoever trains rank 8 is killed."""
    two = replace(spec, trials=2, rungs=(60, 180), reduction=2, space=SPACE | {"learning_rate": 1e-3})
    coordinator = coordinate(two)
    try:
        while coordinator.poll() is None:
            for j in jobs():
                if j.state == "running" and j.params["r"] == 8:
                    with suppress(ProcessLookupError):
                        os.kill(int(str(j.worker).rpartition(":")[2]), signal.SIGKILL)
            time.sleep(0.05)
    finally:
        coordinator.kill()
        coordinator.wait()
    good, bad = sorted((j for j in jobs() if j.rung == 0), key=lambda j: j.params["r"])
    assert (good.params["r"], good.state) == (4, "done")
    # Twice in company, which counts once, and twice alone
    assert (bad.params["r"], bad.state, bad.attempts) == (8, "failed", 4)
    assert str(bad.error).startswith("its worker died 3 times, as it does where memory runs out")
    with transaction() as conn:
        assert studies.get(conn, "m-1")["state"] == "completed"


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_search_with_their_words(spec: StudySpec, home: Path) -> None:
    with pytest.raises(
        TunesmithError, match=r"Search workers died \d times in a row.*No base sha256:0+ is known"
    ) as raised:
        search(replace(spec, base="sha256:" + "0" * 64), progress=quiet)
    assert raised.value.hint == f"See {home / 'logs' / 'worker-1.log'}."


@pytest.mark.slow
def test_a_worker_with_a_home_of_its_own_outlives_the_coordinator(spec: StudySpec, home: Path, tmp_path: Path) -> None:
    """It knows the database's address and where it has the artifacts mounted, and nothing else of ours."""
    shared = tmp_path / "mounted"
    shared.symlink_to(home / "artifacts")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    environment |= {
        name: os.environ[name] for name in ("TUNESMITH_DATABASE_URL", "TUNESMITH_DATABASE_PREFIX")
    } | {"TUNESMITH_HOME": str(tmp_path / "home"), "TUNESMITH_ARTIFACTS": str(shared)}  # fmt: skip
    spec = replace(spec, rungs=(60, 180), trials=9, adapters_per_pass=1)
    with transaction() as conn:  # so that the guest may come before it begins
        studies.create(conn, spec.study, spec.model, spec.to_json())
    command = [sys.executable, "-m", "pipelines.cli", "worker", "--study", "m-1"]
    guest = subprocess.Popen(command, env=environment, cwd=tmp_path)
    coordinator = coordinate(spec)

    def by_guest(found: list[studies.Job]) -> list[studies.Job]:
        return [j for j in found if str(j.worker).endswith(f":{guest.pid}") and j.state == "done"]

    until(lambda: by_guest(jobs()))
    own = psutil.Process(coordinator.pid).children()
    coordinator.kill()
    coordinator.wait()
    psutil.wait_procs(own, timeout=120)
    before = len(by_guest(jobs()))
    best = search(spec, progress=quiet)
    assert guest.wait(60) == 0  # the study is over
    found = jobs()
    assert len(by_guest(found)) > before
    assert {j.trial for j in found} == set(range(9))
    assert {j.state for j in found} == {"done"}
    for j in found:  # each step once, whoever took it
        begun = spec.rungs[j.rung - 1] if j.rung else 0
        assert [step for step, _ in j.curve or []] == list(range(begun + 1, j.steps + 1))
    assert best.value == min(j.value for j in found if j.value is not None)
    assert not (tmp_path / "home" / "artifacts").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="only where a test may have a small disk of its own",
)
def test_a_full_disk_costs_no_trial(spec: StudySpec, home: Path) -> None:
    """Fault 10 in a search: a disk of 64 kB for checkpoints."""
    folder = home / "artifacts" / "checkpoint"
    folder.mkdir()
    small = f'mount -t tmpfs -o size=64k none {folder} && "$@"; code=$?; ls -A {folder} >&2; exit $code'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", small, "sh", *coordinator_of(spec)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]  # nothing half-written is listed after it
    assert "Search workers died" in last
    assert f"Writing a checkpoint to {folder} failed: " in last
    assert "o space left on device" in last
    assert {(j.state, j.attempts) for j in jobs()} == {("waiting", 0)}
    with transaction() as conn:
        assert studies.get(conn, "m-1")["state"] == "running"
    best = search(spec, progress=quiet)
    assert (best.trials, best.failed) == (4, 0)
    assert all(j.state == "done" for j in jobs())


def test_a_run_whose_model_another_took_stops_searching(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 3, for a run that does not notice by itself: its lease ran out, and another run has it now."""
    monkeypatch.setattr(runs, "LEASE_SECONDS", 1.5)
    (tmp_path / "train.jsonl").write_text('{"prompt": "colour", "completion": "red"}\n')
    path = tmp_path / "m.yaml"
    path.write_text(
        "model: m\nbase: builtin:tiny\ndata: {train: train.jsonl}\n"
        "tuning: {trials: 60, max_steps: 150, workers: 1, adapters_per_pass: 1}\n"
    )
    splits = {"train": rows(80), "validation": rows(16, 100), "test": rows(4, 200)}
    kept = datasets.keep(splits, counts={}, sources=[], recipe={})
    plan = plans.train(path, [])
    data = {"base": tiny_base.digest, "dataset": kept.digest, "counts": {"train": 80}}
    taken: list[leases.Lease] = []

    def take_over(study: str) -> None:
        until(lambda: any(j.state == "running" for j in jobs(study)))
        with transaction() as conn:
            conn.execute("update lease set expires_at = clock_timestamp() where name = 'run:m'")
            taken.append(leases.acquire(conn, "run:m", "elsewhere:1 train"))

    begun = runs.begin(
        model="m", kind="train", fingerprint=plan.fingerprint, config=plan.config.jsonable(),
        config_path=str(path), flow_run_id=None,
    )  # fmt: skip

    def carry_out() -> None:
        with begun as run:
            studies_of.append(run.study)
            thief = threading.Thread(target=take_over, args=(run.study,), daemon=True)
            thief.start()
            stages.search(plan, run, data)

    studies_of: list[str] = []
    with pytest.raises(Conflict, match="run:m is no longer held by"):
        carry_out()
    assert sum(j.state == "done" for j in jobs(studies_of[0])) < 60
    with transaction() as conn:
        leases.check(conn, taken[0])  # and nothing of the new run's was touched
