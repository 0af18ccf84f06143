"""`tunesmith run` and its schedules as a person has them: on a real stack, interrupted in every way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from infra import state
from pipelines.docstrings import standard_library
from tests.stacks import Stack, tunesmith


@pytest.fixture(scope="module")
def data(stack: Stack) -> Path:
    """200 rows of real text in the stack's home."""
    pairs = standard_library()
    random.Random(0).shuffle(pairs)
    lines = [
        {"messages": [{"role": "user", "content": p.signature}, {"role": "assistant", "content": p.summary}]}
        for p in pairs[:200]
    ]
    path = stack.home / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pipeline(data: Path, model: str, *, steps: int, trials: int = 2, rungs: int = 2, most_loss: float = 100) -> str:
    """A pipeline file, with a gate that holds unless told otherwise; returns its path."""
    path = data.with_name(f"{model}.yaml")
    path.write_text(
        f"""# tunesmith run -c {path.name}
model: {model}
base: {{path: "builtin:tiny"}}
data: {{train: {data.name}, licence: {{{data.name}: PSF-2.0}}, quality: {{max_tokens: 160}}}}
generation: {{max_tokens: 8}}
tuning:
  trials: {trials}
  max_steps: {steps}
  pruning: {{reduction: 3, rungs: {rungs}, finalists: 1}}
  space: {{r: [4, 8], learning_rate: {{low: 1e-3, high: 5e-3, log: true}}, per_device_train_batch_size: 8}}
evaluation: {{suites: [quality], limit: 12}}
gates: [{{metric: loss, must: at_most, value: {most_loss}}}]
promote: when_gates_pass
"""
    )
    return str(path)


def asked(stack: Stack, query: str, *values: object) -> list[tuple[Any, ...]]:
    found = state.read(stack.home)
    assert found is not None
    with psycopg.connect(found.settings["database_url"]) as conn:
        return conn.execute(query, values).fetchall()  # type: ignore[arg-type]


def hold(stack: Stack, model: str) -> None:
    """As a run of the model on another machine does."""
    query = """insert into lease (name, holder, token, expires_at)
        values (%s, 'elsewhere:1 train', 1, now() + interval '10 minutes') returning name"""
    assert asked(stack, query, f"run:{model}")


def let_go(stack: Stack, model: str) -> None:
    assert asked(stack, "update lease set expires_at = now() where name = %s returning name", f"run:{model}")


def until(true: Callable[[], Any], what: str, seconds: float = 600) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.05)
    return found


def flow_runs(stack: Stack, name: str) -> list[dict[str, Any]]:
    body = {"flow_runs": {"name": {"like_": name}}, "sort": "START_TIME_ASC"}
    found: list[dict[str, Any]] = httpx.post(
        f"{stack.prefect_url}/flow_runs/filter", json=body, trust_env=False, timeout=60
    ).json()
    return found


def nested(stack: Stack, parent: str) -> list[dict[str, Any]]:
    with httpx.Client(base_url=f"{stack.mlflow_url}/api/2.0/mlflow", trust_env=False, timeout=60) as client:
        experiment = client.get("runs/get", params={"run_id": parent}).json()["run"]["info"]["experiment_id"]
        body = {"experiment_ids": [experiment], "filter": f"tags.`mlflow.parentRunId` = '{parent}'"}
        found: list[dict[str, Any]] = client.post("runs/search", json=body).json().get("runs", [])
    return found


def curve(stack: Stack, run: str, key: str) -> list[int]:
    """The steps of a metric's history."""
    url = f"{stack.mlflow_url}/api/2.0/mlflow/metrics/get-history"
    answer = httpx.get(url, params={"run_id": run, "metric_key": key}, trust_env=False, timeout=60).json()
    return [int(point.get("step", 0)) for point in answer.get("metrics", [])]


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What an error is: one sentence and a hint after the progress, and never a traceback."""
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    lines = done.stderr.splitlines()
    sentences = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    assert len(sentences) == 1, done.stderr
    assert len(lines) - sentences[0] <= 2, done.stderr
    return lines[sentences[0]]


def test_a_run_turns_rows_into_a_version_that_serves(stack: Stack, data: Path) -> None:
    done = stack.tunesmith("run", "-c", pipeline(data, "whole", steps=6), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"model", "version", "run_id", "study", "best", "evaluation", "gate", "promoted"} <= set(result)
    assert (result["model"], result["version"], result["promoted"]) == ("whole", 1, True)
    measured = result["evaluation"]["metrics"]["loss"]
    assert set(measured) == {"candidate", "base", "champion", "vs_base", "vs_champion"}
    assert set(measured["candidate"]) >= {"estimate", "low", "high", "level", "n", "higher_is_better"}
    assert measured["champion"] is None
    assert result["gate"]["champion"] is None
    [(evaluation, gate)] = asked(stack, "select evaluation, g.body ->> 'evaluation' from version v join evidence g"
                                        " on g.digest = v.gate where v.model = 'whole'")  # fmt: skip
    assert evaluation == gate, "the decision, which the ledger names, names the evidence it was made from"
    assert any(line.startswith("prepare") for line in done.stderr.splitlines())
    # What a terminal shows is the run's own: no logs of workers, no progress bars of libraries
    foreign = ("INFO", "Warning", "it/s", "shards", "deployments", "Traceback", "Prefect")
    assert [line for line in done.stderr.splitlines() if any(word in line for word in foreign)] == []
    (parent,) = (row[0] for row in asked(stack, "select mlflow_run_id from run where model = 'whole'"))
    trials = nested(stack, parent)
    assert len(trials) == 2
    lengths = sorted(curve(stack, run["info"]["run_id"], "train_loss") for run in trials)
    assert lengths == [[1, 2], [1, 2, 3, 4, 5, 6]]
    assert {run["info"]["status"] for run in trials} == {"FINISHED"}
    (flow,) = flow_runs(stack, "whole.yaml")
    assert flow["state"]["type"] == "COMPLETED"
    body = {"flow_runs": {"id": {"any_": [flow["id"]]}}}
    tasks = httpx.post(f"{stack.prefect_url}/task_runs/filter", json=body, trust_env=False, timeout=60).json()
    assert {(t["name"].rpartition("-")[0], t["state"]["type"]) for t in tasks} == {
        (name, "COMPLETED") for name in ("prepare", "search", "evaluate", "register")
    }
    listed = json.loads(stack.tunesmith("versions", "whole", "--json").stdout)["versions"]
    assert [(v["version"], v["serving"]) for v in listed] == [(1, "champion")]
    given_up = asked(stack, "select checkpoint from rung_job where study = %s", result["study"])
    assert len(given_up) == 3
    _its_lineage(stack, data, result)
    _it_is_reproduced(stack)
    _its_limits_change_without_a_run(stack, data)
    kept = {folder.name for folder in (stack.home / "artifacts" / "checkpoint").iterdir()}
    assert not {digest.removeprefix("sha256:") for (digest,) in given_up} & kept
    # A later search of the model begins with what was best
    changes = [f"--set=tuning.{change}" for change in ("seed=5", "trials=1", "pruning.rungs=1")]
    later = stack.tunesmith("run", "-c", pipeline(data, "whole", steps=6), *changes, "--json")
    assert later.returncode == 0, later.stderr
    assert json.loads(later.stdout)["best"]["params"] == result["best"]["params"]


def start(stack: Stack, config: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipelines.cli", "run", "-c", config]
    return subprocess.Popen(
        command, env=os.environ | {"TUNESMITH_HOME": str(stack.home)}, cwd=stack.home,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _its_lineage(stack: Stack, data: Path, result: dict[str, Any]) -> None:
    made = json.loads(stack.tunesmith("lineage", "whole:1", "--json").stdout)
    assert (made["study"], made["params"]) == (result["study"], result["best"]["params"])
    (source,) = made["dataset"]["sources"]
    assert (source["path"], source["licence"]) == (data.name, "PSF-2.0")
    assert made["environment"].startswith("sha256:")
    assert "PSF-2.0" in stack.tunesmith("lineage", "whole:1").stdout
    seen = json.loads(stack.tunesmith("lineage", "--row", f"{data}:1", "--json").stdout)
    assert [v["version"] for v in seen["versions"] if v["model"] == "whole"] == [1]


def _its_limits_change_without_a_run(stack: Stack, data: Path) -> None:
    limit = "--set=monitoring.alerts=[{metric: p95_latency_ms, above: 9000, severity: critical}]"
    done = stack.tunesmith("apply", "-c", pipeline(data, "whole", steps=6), limit)
    assert done.returncode == 0, done.stderr
    [(settings,)] = asked(stack, "select settings from model where name = 'whole'")
    assert [rule["above"] for rule in settings["monitoring"]["alerts"]] == [9000]
    assert [v[0] for v in asked(stack, "select number from version where model = 'whole'")] == [1]
    unknown = stack.tunesmith("apply", "-c", pipeline(data, "nobodys", steps=6))
    assert (unknown.returncode, said(unknown)) == (5, "error: There is no model nobodys.")


def _it_is_reproduced(stack: Stack) -> None:
    done = stack.tunesmith("reproduce", "whole:1", "--rows", "8", "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["loss"]["now"] == pytest.approx(again["loss"]["then"], abs=0.02)
    assert again["distance"] < 0.2  # a pack's rounding; of another seed it would be about 1.4
    assert again["predictions"]["equal"] >= again["predictions"]["rows"] - 2 > 0
    assert again["environment"] == {}
    assert again["code_version"]["then"] == again["code_version"]["now"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(stack: Stack, data: Path) -> None:
    """Killed in its search, then interrupted in its search, then left alone: no rung twice, one version."""
    config = pipeline(data, "broken-off", steps=600, rungs=3)
    jobs = (
        "select j.trial, j.rung, j.steps, j.state, j.attempts from rung_job j join study s on s.name = j.study"
        " where s.model = 'broken-off' order by trial, rung"
    )

    def rung_is_begun(rung: int) -> Callable[[], bool]:
        return lambda: any(row[1] == rung and row[3] != "waiting" for row in asked(stack, jobs))

    first = start(stack, config)
    try:
        until(rung_is_begun(1), "the second rung")
        other = stack.tunesmith("run", "-c", config)
        assert other.returncode == 4, other.stderr
        assert "Another run of broken-off is in progress (" in said(other)
        first.send_signal(signal.SIGKILL)
        first.wait()
        finished = {row[:2] for row in asked(stack, jobs) if row[3] == "done"}
        assert len(finished) >= 2
        second = start(stack, config)
        try:
            until(psutil.Process(second.pid).children, "a worker of the second run")
            second.send_signal(signal.SIGINT)
            assert second.wait(300) == 130
        finally:
            second.kill()
            second.wait()
    finally:
        first.kill()
        first.wait()
    assert [r[0] for r in asked(stack, "select state from run where model = 'broken-off'")] == ["cancelled"]
    last = stack.tunesmith("run", "-c", config, "--json")
    assert last.returncode == 0, last.stderr
    assert "goes on with run" in last.stderr
    # What ended in the first attempt is not at work again: stages tell of themselves
    assert not any(line.startswith("prepare") for line in last.stderr.splitlines())
    found = asked(stack, jobs)
    assert [(row[0], row[3]) for row in found if row[1] == 0] == [(0, "done"), (1, "done")]
    assert {row[3] for row in found} == {"done"}
    assert all(row[4] == 1 for row in found)  # none was run twice, nor did the interrupt cost an attempt
    assert json.loads(last.stdout)["version"] == 1
    assert asked(stack, "select count(*) from run where model = 'broken-off'") == [(1,)]
    assert asked(stack, "select count(*) from version where model = 'broken-off'") == [(1,)]
    states = [run["state"]["type"] for run in flow_runs(stack, "broken-off.yaml")]
    assert states.count("COMPLETED") == 1
    assert set(states) <= {"CRASHED", "FAILED", "CANCELLED", "COMPLETED"}
    assert states[0] == "CRASHED"
    (parent,) = (row[0] for row in asked(stack, "select mlflow_run_id from run where model = 'broken-off'"))
    for run in nested(stack, parent):
        steps = curve(stack, run["info"]["run_id"], "train_loss")
        assert steps == sorted(set(steps))  # sent again by the next coordinator, and not there twice


def test_rows_of_the_training_file_in_the_test_file_stop_the_promotion(stack: Stack, data: Path) -> None:
    """Fault 23, by `run`, which registers all the same, by `promote`, and by `evaluate`."""
    lines = data.read_text().splitlines(keepends=True)
    data.with_name("apart.jsonl").write_text("".join(lines[:160]))
    data.with_name("judging.jsonl").write_text("".join([*lines[160:], lines[20], lines[3]]))
    config = pipeline(data, "leaking", steps=1, trials=1, rungs=1)
    files = (f"--set=data.train={data.with_name('apart.jsonl')}", f"--set=data.test={data.with_name('judging.jsonl')}")
    named = "apart.jsonl:4 exactly in judging.jsonl:42, apart.jsonl:21 exactly in judging.jsonl:41"
    run = stack.tunesmith("run", "-c", config, "--set=data.licence={}", *files)
    assert run.returncode == 3, run.stderr
    assert "Not promoted: the gate's decision is fail" in run.stderr
    assert named in run.stdout
    listed = json.loads(stack.tunesmith("versions", "leaking", "--json").stdout)["versions"]
    assert [(v["version"], v["serving"]) for v in listed] == [(1, None)]
    promote = stack.tunesmith("promote", "leaking:1", "--reason", "it looks good", "--json")
    assert promote.returncode == 3
    assert named in json.loads(promote.stdout)["error"]["hint"]
    again = stack.tunesmith("evaluate", "leaking:1", "--suite", "quality", "--json")
    assert again.returncode == 3, again.stderr
    judged = json.loads(again.stdout)
    assert (judged["gate"]["metric"], judged["gate"]["rows"]) == ("contamination", 2)
    assert judged["evaluation"]["contamination"]["of"] == 160


def test_errors_are_one_sentence(stack: Stack, data: Path, tmp_path: Path) -> None:
    config = pipeline(data, "errors", steps=1, trials=1, rungs=1)
    (stack.home / "empty").mkdir()

    def fails(code: int, *arguments: str) -> str:
        done = stack.tunesmith(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        return said(done)

    assert "no readable config.json" in fails(2, "run", "-c", config, "--set", f"base.path={stack.home / 'empty'}")
    assert "nowhere.yaml" in fails(2, "run", "-c", str(tmp_path / "nowhere.yaml"))
    assert "No pipeline ever ran for a model nobody" in fails(5, "retrain", "nobody")
    assert "There are 0 new corrections for whole" in fails(2, "retrain", "whole")
    assert "There is no schedule nobody" in fails(5, "schedule", "pause", "nobody")
    never = ("schedule", "add", "never", "-c", config, "--cron")
    assert "not a cron expression" in fails(2, *never, "61 * * * *")
    assert "five fields" in fails(2, *never, "* * * * * *")
    assert "Bad day-of-month" in fails(2, *never, "0 0 30 2 *")
    assert "no time zone" in fails(2, *never, "0 2 * * 1", "--timezone", "Mars/Base")
    assert "not UTF-8" in fails(2, "schedule", "pause", "s\udcff")
    assert "cannot name a schedule" in fails(2, "schedule", "add", "../x", "-c", config, "--cron", "0 2 * * 1")
    other = tunesmith(tmp_path, "run", "-c", config)  # a home without a stack
    assert other.returncode == 6, other.stderr
    said(other)


def test_a_schedule_can_be_added_triggered_paused_and_removed(stack: Stack, data: Path) -> None:
    config = pipeline(data, "weekly", steps=1, trials=1, rungs=1)

    def schedule(*arguments: str) -> Any:
        done = stack.tunesmith("schedule", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    added = schedule("add", "weekly", "-c", config, "--cron", "0 2 * * 1", "--timezone", "Europe/Berlin")
    assert (added["cron"], added["timezone"], added["paused"]) == ("0 2 * * 1", "Europe/Berlin", False)
    again = stack.tunesmith("schedule", "add", "weekly", "-c", config, "--cron", "0 2 * * 1")
    assert again.returncode == 4
    assert "There is already a schedule weekly" in said(again)
    assert schedule("pause", "weekly")["paused"] is True
    assert [s["paused"] for s in schedule("list")["schedules"] if s["name"] == "weekly"] == [True]
    assert schedule("resume", "weekly")["paused"] is False
    # Another run of the model: this one waits for its end, and the schedule cannot go before it
    hold(stack, "weekly")
    run = schedule("trigger", "weekly")

    def kind() -> str:
        answer = httpx.get(f"{stack.prefect_url}/flow_runs/{run['flow_run_id']}", trust_env=False, timeout=60).json()
        return str(answer["state"]["type"])

    until(lambda: kind() == "RUNNING", "the begin of the run")
    early = stack.tunesmith("schedule", "remove", "weekly")
    assert early.returncode == 4
    assert "A run of weekly is going on" in said(early)
    assert asked(stack, "select number from version where model = 'weekly'") == []
    let_go(stack, "weekly")

    def ended() -> str | None:
        return state if (state := kind()) in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    assert until(ended, "the end of the run") == "COMPLETED"
    assert asked(stack, "select number from version where model = 'weekly'") == [(1,)]
    assert schedule("list")["schedules"][0]["last_run"]["state"] == "completed"
    assert schedule("remove", "weekly")["name"] == "weekly"
    assert schedule("list")["schedules"] == []


@pytest.mark.slow
def test_a_schedule_fires_by_itself(stack: Stack, data: Path) -> None:
    config = pipeline(data, "each-minute", steps=1, trials=1, rungs=1)
    hold(stack, "each-minute")

    def slots(*kinds: str) -> list[str]:
        body = {"deployments": {"name": {"any_": ["each-minute"]}}, "flow_runs": {"state": {"type": {"any_": kinds}}}}
        url = f"{stack.prefect_url}/flow_runs/filter"
        return [run["name"] for run in httpx.post(url, json=body, trust_env=False, timeout=60).json()]

    added = stack.tunesmith("schedule", "add", "each-minute", "-c", config, "--cron", "* * * * *")
    assert added.returncode == 0, added.stderr
    # A slot that waits for its turn when the schedule is paused does not come after
    until(lambda: slots("RUNNING"), "the first slot", 200)
    assert stack.tunesmith("schedule", "pause", "each-minute").returncode == 0
    let_go(stack, "each-minute")
    until(lambda: not slots("RUNNING"), "the end of the waiting slot", 60)
    assert slots("CANCELLED")
    assert not slots("SCHEDULED", "PENDING")
    time.sleep(70)
    assert not slots("SCHEDULED", "PENDING", "RUNNING", "COMPLETED")
    assert asked(stack, "select number from version where model = 'each-minute'") == []
    assert stack.tunesmith("schedule", "resume", "each-minute").returncode == 0
    until(lambda: asked(stack, "select number from version where model = 'each-minute'"), "a version", 400)
    assert stack.tunesmith("schedule", "pause", "each-minute").returncode == 0
    until(lambda: not slots("RUNNING"), "the end of the last run", 200)
    assert stack.tunesmith("schedule", "remove", "each-minute").returncode == 0
