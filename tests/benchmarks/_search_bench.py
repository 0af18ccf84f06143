"""What the parts of search.py stand on: their sizes, a home with the base, the clock, and the two sides' processes."""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _home import temporary_home

from infra.db import transaction
from pipelines.tuning.worker import ALLOCATOR
from registry import bases, datasets
from registry.bases import Base

OURS = Path(__file__).with_name("search.py")
PEER = Path(__file__).with_name("search_peer.py")
CORES = 2  # two workers of one thread, or a peer of one or two threads
MAX_TOKENS = 192
PRECISIONS = ("bf16 base", "autocast", "fp32")  # the last one is the fastest where no unit multiplies in bf16
LIKE = 1 / 3  # of what they fell by, that the two sides' losses may differ by: other row orders, bf16 and fp32

SPACE: dict[str, Any] = {
    "r": [4, 8, 16, 32],
    "lora_alpha": [16, 32],
    "lora_dropout": [0.0, 0.05, 0.1],
    "warmup_ratio": 0.0,  # the peer's first step of a warm-up has a rate of zero
    "weight_decay": 0.0,
    "learning_rate": {"low": 1e-4, "high": 5e-3, "log": True},
    "max_grad_norm": 1.0,
    "target_modules": ["attention", "all-linear"],
    "lr_scheduler_type": ["cosine", "linear", "constant"],
    "per_device_train_batch_size": 4,
}
ONE: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "learning_rate": 5e-4,
    "max_grad_norm": 1.0,
    "target_modules": "all-linear",
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 4,
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything. `rungs`, ours and those of the peer's Hyperband, are steps; `pace` steps measure a rate,
    after one that is left out. Our search may begin `more` trials than the peer's, should it not have the peer's best
    by then: they count in its time."""

    seeds: int
    trials: int
    more: int
    rungs: tuple[int, ...]
    peer_rungs: tuple[int, ...]
    train: int
    validation: int
    test: int
    check: int
    pace: int
    probe: int
    rounds: int
    logged_trials: int
    logged_steps: int


LONG = Size(
    seeds=5, trials=16, more=16, rungs=(3, 9, 27), peer_rungs=(3, 9, 27), train=108,
    validation=32, test=96, check=12, pace=12, probe=3, rounds=5, logged_trials=16, logged_steps=1000,
)  # fmt: skip
SHORT = Size(
    seeds=1, trials=4, more=5, rungs=(1, 3, 9), peer_rungs=(1, 3, 9), train=200,
    validation=24, test=48, check=5, pace=5, probe=2, rounds=1, logged_trials=4, logged_steps=300,
)  # fmt: skip


class Meter(threading.Thread):
    """CPU seconds of this process's descendants (the database's among them), sampled, so that they can be told for
    any time since the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.spent: list[float] = []

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(0.4)

    def sample(self) -> None:
        me = psutil.Process()
        own = me.cpu_times()
        total = own.children_user + own.children_system
        for process in me.children(recursive=True):
            try:
                used = process.cpu_times()
            except psutil.Error:  # gone meanwhile, and counted by who waited for it
                continue
            total += used.user + used.system + used.children_user + used.children_system
        self.spent.append(max(total, self.spent[-1] if self.spent else 0.0))
        self.times.append(time.time())

    def at(self, moment: float) -> float:
        after = min(max(bisect.bisect_left(self.times, moment), 1), len(self.times) - 1)
        t0, t1 = self.times[after - 1], self.times[after]
        c0, c1 = self.spent[after - 1], self.spent[after]
        share = min(max((moment - t0) / (t1 - t0), 0.0), 1.0)
        return c0 + share * (c1 - c0)

    def between(self, begun: float, ended: float) -> float:
        while self.times[-1] < ended:
            time.sleep(0.05)
        return self.at(ended) - self.at(begun)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A home with its database, the base, and the clock."""

    home: Path
    size: Size
    base: Base
    meter: Meter

    def peer(self, what: str, job: Mapping[str, Any], *, threads: int = 1) -> list[dict[str, Any]]:
        """What the peer said while it did a job in a process of its own, with when it was launched."""
        job = {"base": str(self.base.folder), "scratch": str(self.home / "peer")} | dict(job)
        return self._run([str(PEER), what], [job], threads)

    def ours(self, what: str, *jobs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The same of jobs of ours, a process of one thread each."""
        environment = ALLOCATOR if what == "pack" else {}  # a search gives it to its workers by itself
        return self._run([str(OURS), "--ours", what], jobs, 1, environment)

    def _run(
        self,
        script: Sequence[str],
        jobs: Sequence[Mapping[str, Any]],
        threads: int,
        more: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        launched, children = time.time(), []
        environment = {**os.environ, **(more or {}), "OMP_NUM_THREADS": str(threads)}
        try:
            for job in jobs:
                with tempfile.NamedTemporaryFile("w", suffix=".json", dir=self.home, delete=False) as file:
                    json.dump(job, file)
                with Path(f"{file.name}.log").open("w") as log:
                    child = subprocess.Popen(
                        [sys.executable, *script, file.name], env=environment, cwd=self.home,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    )  # fmt: skip
                children.append((child, Path(log.name)))
            if len(jobs) > 1:  # they say when they are ready, and begin together
                for child, _ in children:
                    child.stdout.readline()
                for child, _ in children:
                    with contextlib.suppress(BrokenPipeError):  # how it ended is told below
                        child.stdin.write("\n")
                        child.stdin.flush()
            events = []
            for child, log in children:
                said, _ = child.communicate()
                if child.returncode:
                    sys.exit(f"{' '.join(script)} failed:\n{said[-1000:]}{log.read_text()[-3000:]}")
                events += [json.loads(line) | {"launched": launched} for line in said.splitlines() if line[:1] == "{"]
            return events
        finally:
            for child, _ in children:
                if child.poll() is None:
                    child.terminate()


@contextlib.contextmanager
def prepared(size: Size, base_id: str) -> Iterator[Bench]:
    """A home of our own with a database, and the base in it."""
    with temporary_home() as home:
        with transaction() as conn:
            conn.execute("insert into model (name) values ('m')")
        say("making the base")
        base = bases.resolve(base_id)
        meter = Meter()
        meter.start()
        yield Bench(home=home.folder, size=size, base=base, meter=meter)


@dataclass(frozen=True, kw_only=True)
class World:
    """A seed's own rows: their data set, and the same tokens as the peer reads them."""

    seed: int
    dataset: str
    rows: Path


def make_world(bench: Bench, seed: int) -> World:
    from pipelines.data.tokenise import tokenised
    from pipelines.demo import SYSTEM
    from pipelines.docstrings import standard_library
    from pipelines.tuning.trainer import epoch_of

    size, pairs = bench.size, standard_library()
    random.Random(seed).shuffle(pairs)
    kept = [
        datasets.make_row([
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": pair.signature},
            {"role": "assistant", "content": pair.summary},
        ])
        for pair in pairs[: size.train + size.validation + size.test]
    ]  # fmt: skip
    splits = {
        "train": kept[: size.train],
        "validation": kept[size.train : size.train + size.validation],
        "test": kept[size.train + size.validation :],
    }
    dataset = datasets.keep(splits, counts={}, sources=[], recipe={"benchmark": seed})
    rows: dict[str, list[tuple[list[int], int]]] = {}
    for split in splits:
        tokens = tokenised(dataset, split, bench.base, max_tokens=MAX_TOKENS, system=None)
        rows[split] = [(tokens.row(i).tolist(), int(tokens.prompt_lengths[i])) for i in range(len(tokens))]
    # Of the batches that our search takes, since which rows come first moves a loss after few steps by more than most
    # configurations differ; the peer takes them in turn
    lengths = [len(ids) for ids, _ in rows["train"]]
    size_of_batch = SPACE["per_device_train_batch_size"]
    batches = epoch_of(lengths, size_of_batch, seed=seed, epoch=0)
    rows["train"] = [rows["train"][i] for batch in batches for i in batch]
    path = bench.home / f"rows-{seed}.json"
    path.write_text(json.dumps(rows))
    shutil.rmtree(bench.home / "artifacts" / "tokens")  # our search makes them again, in its own time
    return World(seed=seed, dataset=dataset.digest, rows=path)


def fastest(bench: Bench, rows: Path, params: Mapping[str, Any], precisions: Sequence[str]) -> tuple[str, int]:
    """The peer's quickest way on this machine: of these precisions, and of one and two threads."""
    found = {}
    for precision in precisions:
        for threads in (1, CORES):
            job = {"rows": str(rows), "precision": precision, "steps": 1 + bench.size.probe, "adapters": [params],
                   "check": False}  # fmt: skip
            (event,) = bench.peer("train_each", job, threads=threads)
            found[precision, threads] = (event["ended"] - event["begun"]) / bench.size.probe
            say(f"probe: the peer with {precision}, {threads} thread(s): {found[precision, threads]:.2f} s a step")
    return min(found, key=lambda way: found[way])


def median(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def print_ratio(name: str, ratios: Sequence[float], target: float | None) -> None:
    print(f"    {name}: {statistics.median(ratios):.2f}x (from {min(ratios):.2f} to {max(ratios):.2f}"
          f"{f'; target {target:g}' if target else ''})")  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def say_json(**event: Any) -> None:
    """What a process of ours tells the one that measures, with the time."""
    print(json.dumps(event | {"at": time.time()}), flush=True)
