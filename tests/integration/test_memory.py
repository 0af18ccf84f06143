"""Trials that do not fit into memory: the estimate against the real peak, and a search that goes on around them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.db import transaction
from infra.settings import get_settings
from pipelines.tuning import memory
from pipelines.tuning.search import search
from pipelines.tuning.spec import StudySpec
from pipelines.tuning.worker import SHARING
from registry import datasets, studies
from registry.bases import Base
from registry.datasets import Row, make_row
from registry.halving import brackets

linux = pytest.mark.skipif(sys.platform != "linux", reason="other kernels neither tell nor limit it")
SPACE = {
    "r": 4, "learning_rate": 1e-3, "lora_alpha": 8, "lora_dropout": 0.0, "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "target_modules": "all-linear",
    "per_device_train_batch_size": [2, 3, 256],
}  # fmt: skip

_BEGIN = """
import json, sys, tempfile
from pathlib import Path
from pipelines.tuning import memory, worker
from pipelines.tuning.methods import packable
from pipelines.tuning.spec import StudySpec
from pipelines.tuning.trainer import Member, PackTooLarge
spec = StudySpec.from_json(json.loads(sys.argv[1]))
trainer = worker.make_trainer(spec)
def params(batch):
    return spec.space | {"per_device_train_batch_size": batch}
def run(batch, count):
    return trainer.run([Member(params=params(batch), seed=n, start=None, init_adapter=None,
                               save_to=Path(tempfile.mkdtemp())) for n in range(count)], total_steps=2, until=2)
"""
# Resets the kernel's mark of the peak and trains: the growth that was estimated, and the real one
_PEAKS = """
def peak():
    return 1024 * int(next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l).split()[1])
found = []
for batch, count in ((8, 1), (64, 1), (64, 4) if packable(spec.space) else (128, 1)):
    needed = trainer.needs([params(batch)] * count)
    Path("/proc/self/clear_refs").write_text("5")
    run(batch, count)
    found.append((needed - trainer._begun_with, peak() - trainer._begun_with))
print(json.dumps(found))
"""
_RANKS = "print(json.dumps([trainer.needs([params(2) | {'r': r}]) for r in (8, 2048)]))"
_SHARE = "print(json.dumps([trainer.room, memory.share(6, 'cpu')]))"
_NEEDS = "print(json.dumps([trainer.needs([params(batch)]) for batch in (3, 256)]))"
# Without the estimate the limit of the process holds
_LIMIT = """
trainer.room = None
run(2, 1)
memory.confine(memory.used("cpu") + 60_000_000, "cpu")
try:
    run(256, 4)
    together = "trained"
except PackTooLarge as error:
    together = str(error)
print(json.dumps([together, str(run(256, 1)[0]), type(run(2, 1)[0]).__name__]))
"""


def python(spec: StudySpec, code: str) -> Any:
    """What a process that opened the study as a worker does prints."""
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + code, json.dumps(spec.to_json())], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(count: int, start: int = 0) -> list[Row]:
    return [
        make_row(
            [
                {"role": "user", "content": f"say number {n} " + "and another word " * 12},
                {"role": "assistant", "content": f"number {n} it is"},
            ],
            source="train", group=str(n),
        )
        for n in range(start, start + count)
    ]  # fmt: skip


@pytest.fixture
def spec(tiny_base: Base) -> StudySpec:
    splits = {"train": rows(300), "validation": rows(4, 400), "test": rows(4, 500)}
    kept = datasets.keep(splits, counts={}, sources=[], recipe={})
    with transaction() as conn:
        conn.execute("insert into model (name) values ('m')")
    return StudySpec(
        study="m-1", model="m", base=tiny_base.digest, dataset=kept.digest, system=None, max_tokens=256, trials=4,
        rungs=(2,), reduction=3, space=SPACE, workers=1, adapters_per_pass=1,
    )  # fmt: skip


def test_a_guest_counts_itself_alone_and_one_of_a_crew_its_mates(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of workers that the coordinator's machine has."""
    monkeypatch.delenv(SHARING, raising=False)
    many = replace(spec, workers=10_000)
    room, _ = python(many, _SHARE)
    assert room > 100 * memory.share(10_000, "cpu")  # other tests' workers may be at work here too
    monkeypatch.setenv(SHARING, "6")
    room, sixth = python(many, _SHARE)
    assert room == pytest.approx(sixth, rel=0.01)


@linux
@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_the_estimate_is_near_the_real_peak(spec: StudySpec, method: dict[str, Any]) -> None:
    found = python(replace(spec, space=spec.space | method), _PEAKS)
    assert found[0][1] < found[1][1] < found[2][1], "larger passes take more"
    for estimated, real in found[1:]:  # the first is too small to tell from what else a process does
        assert 0.6 < estimated / real < 1.7, found


@linux
def test_of_rows_of_unlike_length_the_largest_pass_counts(spec: StudySpec) -> None:
    """One long row, and many short ones with long answers, of which a pass holds more."""
    long = make_row([{"role": "user", "content": "and another word " * 150}, {"role": "assistant", "content": "yes"}])
    short = [
        make_row([{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is " * 12}])
        for n in range(200)
    ]
    kept = datasets.keep({"train": [long, *short], "validation": rows(4, 400), "test": rows(4, 500)},
                         counts={}, sources=[], recipe={})  # fmt: skip
    found = python(replace(spec, dataset=kept.digest, max_tokens=2048), _PEAKS)
    for estimated, real in found[1:]:
        assert 0.6 < estimated / real < 2.5, found


@linux
def test_what_the_estimate_lets_through_fails_in_its_process(spec: StudySpec) -> None:
    together, alone, after = python(spec, _LIMIT)
    assert together == "4 trials do not fit into memory together"
    assert alone.startswith("out of memory with {")
    assert after == "Outcome"  # and the worker trains on


def test_a_search_goes_on_around_trials_that_do_not_fit(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    small, large = python(spec, _NEEDS)
    monkeypatch.setenv("TUNESMITH_WORKER_MEMORY_GB", f"{(small + large) / 2e9:.4f}")
    get_settings.cache_clear()
    best = search(replace(spec, trials=3), progress=lambda *_: None)
    with transaction() as conn:
        found = studies.jobs(conn, "m-1")
    assert sorted(j.state for j in found) == ["done", "done", "failed"]
    assert best.failed == 1
    (refused,) = (j for j in found if j.state == "failed")
    assert refused.params["per_device_train_batch_size"] == 256
    assert re.match(
        r"out of memory: it would need about \d\.\d\d GB, and a worker may use \d\.\d\d GB", str(refused.error)
    )
    assert refused.attempts == 1


def test_a_pack_that_does_not_fit_is_tried_unpacked_and_what_was_too_large_avoided(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    small, large = python(spec, _RANKS)
    monkeypatch.setenv("TUNESMITH_WORKER_MEMORY_GB", f"{(small + large) / 2e9:.4f}")
    get_settings.cache_clear()
    space = SPACE | {"per_device_train_batch_size": 2, "r": [4, 8, 2048, 4096]}
    spec = replace(spec, space=space, trials=6, rungs=(2, 4), reduction=2, adapters_per_pass=2)
    best = search(spec, progress=lambda *_: None)
    with transaction() as conn:
        found = studies.jobs(conn, "m-1")
    begun = {j.trial: j for j in found if j.rung == 0}
    failed = [j for j in begun.values() if j.state == "failed"]
    assert failed
    assert {j.params["r"] for j in found if j.state == "done"} == {4, 8}, "the others of a pack are not to blame"
    assert best.failed == len(failed)
    for j in failed:
        assert j.params["r"] >= 2048
        assert str(j.error).startswith("out of memory: it would need about ")
    assert {j.attempts for j in begun.values()} == {1}
    assert re.search(r"2 trials together would need .*; each is tried alone", (home / "logs/worker-1.log").read_text())
    in_turn = [begun[trial].params["r"] for trial in sorted(begun)]
    groups = [in_turn[group.start : group.stop] for group in brackets(spec)]
    for earlier, later in pairwise(groups):
        too_large = [r for r in earlier if r >= 2048]
        assert not any(r >= least for r in later for least in too_large), groups


@pytest.mark.slow
def test_a_guest_leaves_to_others_what_does_not_fit_into_its_memory(spec: StudySpec, tmp_path: Path) -> None:
    small, large = python(spec, _NEEDS)
    space = SPACE | {"per_device_train_batch_size": 256, "learning_rate": [1e-4, 1e-3]}
    spec = replace(spec, space=space, trials=2)
    with transaction() as conn:
        studies.create(conn, spec.study, spec.model, spec.to_json())
    environment = os.environ | {"TUNESMITH_WORKER_MEMORY_GB": f"{(small + large) / 2e9:.4f}"}
    said = tmp_path / "said"
    with said.open("wb") as file:
        guest = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "worker", "--study", "m-1"], env=environment, stderr=file
        )
    try:
        end = time.monotonic() + 120
        while "model.safetensors" not in Path(f"/proc/{guest.pid}/maps").read_text():  # the base is mapped
            assert time.monotonic() < end
            time.sleep(0.1)
        best = search(spec, progress=lambda *_: None)
        assert guest.wait(60) == 0
    finally:
        guest.kill()
        guest.wait()
    with transaction() as conn:
        found = studies.jobs(conn, "m-1")
    assert [(j.state, j.attempts) for j in found] == [("done", 1)] * 2
    assert best.failed == 0
    assert re.search(r"trial \d is left to other workers: out of memory", said.read_text())


def test_workers_whose_coordinator_is_gone_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end after their rung, and those that take their place use what they had."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    worker = ["python", "-m", "pipelines.tuning.worker", "s"]

    def share(*parents: str) -> int:
        found = [SimpleNamespace(info={"cmdline": [*worker, parent]}) for parent in parents]
        monkeypatch.setattr(memory.psutil, "process_iter", lambda names: found)
        return memory.share(1, "cpu")

    here = str(os.getpid())
    assert share(here, here) == pytest.approx(share(here) / 2, abs=1)
    assert share(here, gone.stdout.decode().strip()) == share(here)
