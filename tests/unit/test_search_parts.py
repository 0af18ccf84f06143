"""Parts of the search that need no training to be looked at."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import stages
from pipelines.tuning import devices, memory
from pipelines.tuning.crew import Crew
from pipelines.tuning.search import as_large
from pipelines.tuning.trainer import Trainer
from pipelines.tuning.worker import SHARING

PLAIN = {"r": 8, "use_dora": False, "init_lora_weights": True, "per_device_train_batch_size": 4}


class Timed(Trainer):
    """A trainer whose steps take as long as a test says, by how many adapters are in them."""

    def __init__(self, seconds: Mapping[int, float], *, room: int | None = None) -> None:
        self.seconds, self.room = seconds, room

    @contextmanager
    def _some_layers(self) -> Iterator[float]:
        yield 1.0

    def _time(self, members: Sequence[Mapping[str, Any]]) -> float:
        return self.seconds[len(members)]

    def needs(self, members: Sequence[Mapping[str, Any]]) -> int:
        return 100 * len(members)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 4: 2.0, 8: 3.0}, 8),  # 2.7 adapters a second
        ({1: 1.0, 4: 1.2, 8: 4.0}, 4),
        ({1: 1.0, 4: 4.4, 8: 9.0}, 1),  # company costs
        ({1: 1.0, 4: 3.95, 8: 7.99}, 1),  # no more than a measurement's error
    ],
)
def test_as_many_adapters_in_a_pass_as_pay(seconds: dict[int, float], best: int, caplog: Any) -> None:
    caplog.set_level(logging.ERROR)
    assert Timed(seconds).best_pack(PLAIN, most=8, steps=10**9) == best


def test_no_more_than_there_is_memory_for_and_none_that_must_train_alone() -> None:
    pays = {1: 1.0, 4: 1.0, 8: 1.0}
    assert Timed(pays, room=500).best_pack(PLAIN, most=8, steps=10**9) == 4
    assert Timed(pays, room=100).best_pack(PLAIN, most=8, steps=10**9) == 1
    assert Timed(pays).best_pack(PLAIN | {"use_dora": True}, most=8, steps=10**9) == 1


def test_what_needs_at_least_as_much_memory() -> None:
    failed = PLAIN | {"target_modules": "all-linear", "layers_to_transform": "all"}
    assert as_large(failed, failed)
    assert as_large(failed | {"r": 16}, failed)
    assert as_large(failed | {"per_device_train_batch_size": 8}, failed)
    assert not as_large(failed | {"r": 4}, failed)
    assert not as_large(failed | {"r": 16, "per_device_train_batch_size": 2}, failed)
    assert not as_large(failed | {"target_modules": "attention"}, failed)


def test_gpus_are_those_that_this_process_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "driver" / str(number)).mkdir(parents=True)
    spec = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "driver")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.gpus() == []  # torch is built for the processor
    (tmp_path / "torch" / "lib" / "libtorch_cuda.so").touch()
    assert devices.gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-a1")
    assert devices.gpus() == ["2", "GPU-a1"]
    assert devices.workers() == 2
    # A worker is told with how many it shares its GPU, or where there is none, the machine
    shares = [Crew("s", 3).surroundings(place) for place in (1, 2, 3)]
    assert [(each["CUDA_VISIBLE_DEVICES"], each[SHARING]) for each in shares] == [
        ("2", "2"),
        ("GPU-a1", "1"),
        ("2", "2"),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.gpus() == []
    assert Crew("s", 3).surroundings(1)[SHARING] == "3"


def test_a_share_of_memory_counts_the_workers_of_other_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [
        ["python", "-m", "pipelines.tuning.worker", "m-1", "1"],
        ["python", "-m", "pipelines.tuning.worker", "m-1", "1"],
        ["/usr/bin/python3", "/opt/bin/tunesmith", "worker", "--study", "m-2"],
        ["python", "-m", "pipelines.cli", "worker", "--study", "m-2"],
        ["python", "-m", "celery", "worker"],
        ["vi", "worker.py"],
    ]
    found = [SimpleNamespace(info={"cmdline": command}) for command in [*commands, None]]
    monkeypatch.delenv("TUNESMITH_WORKER_MEMORY_GB", raising=False)
    monkeypatch.setattr(memory.psutil, "process_iter", lambda names: [])
    whole = memory.share(1, "cpu")
    monkeypatch.setattr(memory.psutil, "process_iter", lambda names: found)
    assert memory.share(2, "cpu") == pytest.approx(whole / 4, abs=2)
    assert memory.share(8, "cpu") == pytest.approx(whole / 8, abs=2)


@pytest.mark.parametrize(
    ("kind", "tuning", "retrain", "base", "wanted"),
    [
        ("train", "base", None, "b", None),
        ("train", "champion", None, "b", "the bundle"),
        ("train", "champion", None, "another", None),
        ("retrain", "base", "champion", "b", "the bundle"),
        ("retrain", "champion", "base", "b", None),
        ("retrain", "base", None, "b", None),
    ],
)
def test_trials_begin_with_the_champions_weights_where_the_file_says_so(
    tmp_path: Path, kind: Any, tuning: str, retrain: str | None, base: str, wanted: str | None
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"use_dora": false}')
    champion = SimpleNamespace(base_digest="b", bundle_digest="the bundle", name="m:1", adapter=lambda: tmp_path)
    config = SimpleNamespace(
        tuning=SimpleNamespace(start_from=tuning),
        retrain=None if retrain is None else SimpleNamespace(start_from=retrain),
    )
    plan = SimpleNamespace(kind=kind, champion=champion, config=config)
    assert stages._init_bundle(plan, {"base": base}) == wanted  # type: ignore[arg-type]
    plan.champion = None
    assert stages._init_bundle(plan, {"base": base}) is None  # type: ignore[arg-type]
    plan.champion = champion
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    assert stages._init_bundle(plan, {"base": base}) is None  # type: ignore[arg-type]
