"""The search against the loop that people write: Optuna, transformers' Trainer and PEFT, and MLflow's own logging.

    .venv/bin/python tests/benchmarks/search.py [--short] [--seeds N] [--part a|b|c|d] [--keep FILE]

Parts: (a) time and CPU seconds until our search has a validation loss at or below the peer's final best one, against
the plain loop in fp32; (b) against the same loop with Hyperband and bf16 (fp32 where that is faster); (c)
adapter-tokens a second with eight adapters; (d) what logging costs a study. Both sides run by turns, on the same
rows, space, sampler and cores; what they did is checked first. No time is asserted: a figure is printed, with the
target it has. Run it alone. A seed of (a) and (b) takes up to half an hour; with `--keep` its
figures are kept, and the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from _home import started, temporary_home

from infra import ports, services
from infra.db import transaction
from infra.settings import get_settings
from pipelines.config_space import order
from pipelines.tuning.spec import StudySpec, rungs
from pipelines.tuning.worker import ALLOCATOR
from registry import bases, datasets, studies
from registry.bases import Base
from registry.statistics import sign_test

PEER = Path(__file__).with_name("search_peer.py")
ROOT = Path(__file__).parents[2]
CORES = 2  # two workers of one thread, or a peer of one or two threads
MAX_TOKENS = 192
PRECISIONS = ("bf16 base", "autocast", "fp32")  # the last one is the fastest where no unit multiplies in bf16
LIKE = 1 / 3  # of what they fell by, that the two sides' losses may differ by: other row orders, bf16 and fp32
RESCORED = 0.02  # nats that a claimed validation loss may differ by from the common scorer's, in fp32

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
    seeds=5, trials=16, more=16, rungs=(3, 7, 14, 27), peer_rungs=(3, 9, 27), train=108,
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
        return self._run([__file__, "--ours", what], jobs, 1, environment)

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


# --- (a) and (b): the search ---


def compare_searches(bench: Bench, parts: Sequence[str], keep: Path | None) -> None:
    size, kept = bench.size, Kept(keep, bench.size)
    ways: dict[str, Sequence[str]] = {"a": ["fp32"], "b": PRECISIONS}
    probe = make_world(bench, 1000).rows
    peers = {part: fastest(bench, probe, ONE, ways[part]) for part in ways if part in parts}
    check_that_both_learn_alike(bench, peers)
    for seed in range(size.seeds):
        if all((part, seed) in kept.rows for part in peers):
            say(f"  seed {seed}: kept")
            continue
        world = make_world(bench, seed)
        sides = [*peers, "ours"]
        if seed % 2:
            sides.reverse()
        found = {side: run_ours(bench, world) if side == "ours" else run_peer(bench, world, side, peers[side])
                 for side in sides}  # fmt: skip
        judged = judge(bench, world, {side: run.adapter for side, run in found.items()})
        for side, run in found.items():
            off = abs(judged[side]["validation"] - run.best)
            say(f"  seed {seed} {side}: best validation loss {run.best:.4f} (common scorer "
                f"{judged[side]['validation']:.4f}), test {judged[side]['test']:.4f}, {run.about}")  # fmt: skip
            if off > RESCORED:
                sys.exit(f"The loss that {side} claims is not its adapter's: off by {off:.3f}.")
        ours = found["ours"]
        for part in peers:
            row = row_of(bench, found[part], ours, judged[part]["test"], judged["ours"]["test"])
            kept.add(part, seed, row)
            same = sum(a == b for a, b in zip(found[part].drawn, ours.drawn, strict=False))
            say(
                f"  seed {seed} ({part}): {same} of {len(ours.drawn)} configurations are the same on both sides; "
                + ", ".join(f"{name} {value:.1f}" for name, value in row.items() if value and "_" in name)
            )
    for part, (precision, threads) in peers.items():
        print_searches(size, part, precision, threads, [kept.rows[part, seed] for seed in range(size.seeds)])


class Kept:
    """Figures of seeds, by part and seed, in a file that outlives an interrupt; of one size of the benchmark only."""

    def __init__(self, file: Path | None, size: Size) -> None:
        self.file, self.size = (
            file,
            {n: v for n, v in json.loads(json.dumps(asdict(size))).items() if n not in ("seeds", "rounds")},
        )
        self.rows: dict[tuple[str, int], Mapping[str, Any]] = {}
        for line in file.read_text().splitlines() if file is not None and file.exists() else ():
            found = json.loads(line)
            if found["size"] == self.size:
                self.rows[found["part"], found["seed"]] = found["row"]

    def add(self, part: str, seed: int, row: Mapping[str, Any]) -> None:
        self.rows[part, seed] = row
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"part": part, "seed": seed, "size": self.size, "row": row}) + "\n")


@dataclass(frozen=True, kw_only=True)
class World:
    """A seed's own rows: their data set, and the same tokens as the peer reads them."""

    seed: int
    dataset: str
    rows: Path


@dataclass(frozen=True, kw_only=True)
class Run:
    """A study that is over: each value with when it was there; `drawn` are the configurations, by trial."""

    launched: float
    ended: float
    values: list[tuple[float, float]]
    best: float
    adapter: str
    drawn: list[dict[str, Any]]
    about: str

    def reached(self, target: float) -> float | None:
        """When a value at or below the target was first there."""
        return min((at for at, value in self.values if value <= target), default=None)


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


def run_peer(bench: Bench, world: World, part: str, how: tuple[str, int], **other: Any) -> Run:
    size = bench.size
    keep = bench.home / f"peer-{part}-{world.seed}"
    job = {
        "rows": str(world.rows), "seed": world.seed, "trials": size.trials, "rungs": size.peer_rungs,
        "steps": size.rungs[-1], "reduction": 3,
        "space": {name: SPACE[name] for name in order(SPACE)}, "hyperband": part == "b", "precision": how[0],
        "keep": str(keep),
    } | other  # fmt: skip
    events = bench.peer("tune", job, threads=how[1])
    done = [e for e in events if e["state"] == "done"]
    if not all(e["steps"] == job["steps"] for e in done) or len(events) != job["trials"]:
        sys.exit(f"The peer of part {part} did not run all of its trials: {events}")
    return Run(
        launched=events[0]["launched"],
        ended=events[-1]["at"],
        values=[(e["at"], e["value"]) for e in done],
        best=min(e["value"] for e in done),
        adapter=str(keep),
        drawn=[e["params"] for e in events],
        about=f"{sum(e['steps'] for e in events)} steps, {len(done)} of {len(events)} trials to the end",
    )


def run_ours(bench: Bench, world: World, **other: Any) -> Run:
    size = bench.size
    spec = StudySpec(
        study=f"study-{world.seed}", model="m", base=bench.base.digest, dataset=world.dataset, system=None,
        max_tokens=MAX_TOKENS, trials=size.trials + size.more, rungs=size.rungs, reduction=2, space=SPACE,
        seed=world.seed, workers=CORES,
    )  # fmt: skip
    spec = replace(spec, **other)
    (best,) = bench.ours("search", spec.to_json())
    with transaction() as conn:
        jobs = studies.jobs(conn, spec.study)
    done = [j for j in jobs if j.state == "done" and j.value is not None]
    for job in done:
        begun = spec.rungs[job.rung - 1] if job.rung else 0
        if [step for step, _ in job.curve or []] != list(range(begun + 1, job.steps + 1)):
            sys.exit(f"Trial {job.trial} of ours did not take all steps of rung {job.rung}.")
    to_the_end = len([j for j in done if j.rung == len(spec.rungs) - 1])
    drawn = {j.trial: {name: j.params[name] for name in spec.space} for j in jobs}
    return Run(
        launched=best["launched"],
        ended=best["at"],
        values=[(j.updated_at.timestamp(), j.value) for j in done],
        best=best["value"],
        adapter=best["adapter"],
        drawn=[drawn[trial] for trial in sorted(drawn)],
        about=f"{sum(len(j.curve or []) for j in done)} steps, {to_the_end} of {len(drawn)} trials to the end",
    )


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


def check_that_both_learn_alike(bench: Bench, peers: Mapping[str, tuple[str, int]]) -> None:
    """One configuration, the same rows: the base's loss falls to about the same value on all sides."""
    world, steps = make_world(bench, 2000), bench.size.check
    fixed = {"trials": 1, "rungs": (steps,), "space": ONE}
    before = judge(bench, world, {"base": None})["base"]["validation"]
    runs = {f"peer {part}": run_peer(bench, world, part, how, **fixed, steps=steps, hyperband=False)
            for part, how in peers.items()}  # fmt: skip
    runs["ours"] = run_ours(bench, world, **fixed)
    after = ", ".join(f"{side} {run.best:.3f}" for side, run in runs.items())
    say(f"check: validation loss of the base {before:.3f}; after {steps} steps of one configuration: {after}")
    values = [run.best for run in runs.values()]
    if max(values) - min(values) > LIKE * (before - max(values)):
        sys.exit("The two sides do not do the same work.")


def judge(bench: Bench, world: World, adapters: Mapping[str, str | None]) -> dict[str, dict[str, float]]:
    """Validation and test losses by the peer's scorer, on the base in fp32."""
    job = {"rows": str(world.rows), "precision": "fp32", "adapters": list(adapters.values()),
           "splits": ["validation", "test"]}  # fmt: skip
    return dict(zip(adapters, bench.peer("judge", job), strict=True))


def row_of(bench: Bench, peer: Run, ours: Run, peer_test: float, our_test: float) -> dict[str, float | None]:
    """Seconds and CPU seconds since each side was launched: until the peer's best value was there, and of the whole."""
    at, cpu = ours.reached(peer.best), bench.meter.between
    had = peer.reached(peer.best)
    assert had is not None
    return {
        "target": peer.best,
        "best": ours.best,
        "peer_to": had - peer.launched,
        "peer_to_cpu": cpu(peer.launched, had),
        "peer_all": peer.ended - peer.launched,
        "peer_all_cpu": cpu(peer.launched, peer.ended),
        "ours_to": at - ours.launched if at else None,
        "ours_to_cpu": cpu(ours.launched, at) if at else None,
        "ours_all": ours.ended - ours.launched,
        "ours_all_cpu": cpu(ours.launched, ours.ended),
        "peer_test": peer_test,
        "our_test": our_test,
    }


def print_searches(size: Size, part: str, precision: str, threads: int, rows: Sequence[Mapping[str, Any]]) -> None:
    pruning = f"Optuna's Hyperband (resource {size.peer_rungs[0]} to {size.peer_rungs[-1]} steps, reduction 3)"
    print(f"\n({part}) Time to the peer's final best validation loss; {size.trials} trials of {size.rungs[-1]} steps")
    print(f"    peer: Optuna (TPE), Trainer and PEFT in a loop, {precision}, {threads} thread(s), "
          f"{pruning if part == 'b' else 'no pruning'}, model loaded for each trial, one loss on all validation rows "
          f"at {'each rung' if part == 'b' else 'the end'}; rows come tokenised")  # fmt: skip
    print(f"    ours: {CORES} workers of one thread, {size.trials + size.more} trials at most, rungs {size.rungs}, "
          "reduction 2; both clocks from process start")  # fmt: skip
    print("    seed  target   ours | to target: peer s (CPU)    ours s (CPU)  | whole: peer s (CPU)     ours s (CPU)")
    for seed, row in enumerate(rows):
        reached = f"{row['ours_to']:7.1f} ({row['ours_to_cpu']:.1f})" if row["ours_to"] else "not reached"
        print(f"    {seed:4d}  {row['target']:.4f} {row['best']:.4f}"
              f" | {row['peer_to']:10.1f} ({row['peer_to_cpu']:.1f})"
              f"  {reached:>15} | {row['peer_all']:9.1f} ({row['peer_all_cpu']:.1f})"
              f"  {row['ours_all']:7.1f} ({row['ours_all_cpu']:.1f})")  # fmt: skip
    target = {"a": 8, "b": 2.5}[part]
    for name, peer, ours in (
        ("until the peer's best was there, wall", "peer_to", "ours_to"),
        ("until the peer's best was there, CPU", "peer_to_cpu", "ours_to_cpu"),
        ("peer's whole study, ours until its best, wall", "peer_all", "ours_to"),
        ("peer's whole study, ours until its best, CPU", "peer_all_cpu", "ours_to_cpu"),
        ("whole studies, wall", "peer_all", "ours_all"),
        ("whole studies, CPU", "peer_all_cpu", "ours_all_cpu"),
    ):
        # A target that was not reached counts as never
        ratios = [row[peer] / row[ours] if row[ours] else 0.0 for row in rows]
        print_ratio(name, ratios, target if ours.startswith("ours_to") else None)
    more = [row["our_test"] - row["peer_test"] for row in rows]
    chance = sign_test([row["our_test"] for row in rows], [row["peer_test"] for row in rows])
    print(f"    test loss of the winners, medians: peer {median(rows, 'peer_test'):.4f}, ours "
          f"{median(rows, 'our_test'):.4f}; ours less the peer's: mean {statistics.mean(more):+.4f}, from "
          f"{min(more):+.4f} to {max(more):+.4f}, p {chance:.2f} (sign test)")  # fmt: skip


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


def ours_search(job: Mapping[str, Any]) -> None:
    from pipelines.tuning.search import search

    best = search(StudySpec.from_json(dict(job)), progress=lambda *_: None)
    say_json(**best.to_json())


# --- (c): many adapters ---


def compare_rates(bench: Bench) -> None:
    """Adapter-tokens a second of eight adapters, at few and at many tokens an adapter in a step."""
    size = bench.size
    for length, rows, target in ((32, 1, 3), (48, 8, 2)):
        path = even_rows(bench, length)
        draw = random.Random(length)
        adapters = [
            {name: draw.choice(value) if isinstance(value, list) else value for name, value in SPACE.items()}
            | {"learning_rate": 10 ** draw.uniform(-4, -3), "lora_dropout": 0.0, "per_device_train_batch_size": rows}
            for _ in range(8)
        ]
        how = fastest(bench, path, adapters[0], PRECISIONS)
        jobs = {
            "peer": [{"rows": str(path), "precision": how[0], "steps": 1 + size.pace, "adapters": adapters}],
            "ours": packs(bench, path, adapters, size.pace, each=len(adapters) // CORES),
            "ours, twice as many": packs(bench, path, adapters, size.pace, each=len(adapters)),
        }
        found: dict[str, list[dict[str, float]]] = {side: [] for side in jobs}
        for number in range(size.rounds):
            for side in jobs if number % 2 == 0 else reversed(jobs):
                if side == "peer":
                    events = bench.peer("train_each", jobs[side][0] | {"check": number == 0}, threads=how[1])
                    seconds = sum(e["ended"] - e["begun"] for e in events)
                    cpu = sum(bench.meter.between(e["begun"], e["ended"]) for e in events)
                else:
                    events = bench.ours("pack", *jobs[side])
                    begun, ended = min(e["begun"] for e in events), max(e["ended"] for e in events)
                    seconds, cpu = ended - begun, bench.meter.between(begun, ended)
                tokens = sum(e["tokens"] for e in events)
                found[side].append({"wall": tokens / seconds, "cpu": tokens / cpu})
                if number == 0:
                    after = [loss for e in events for loss in (e["after"] if side != "peer" else [e["after"]])]
                    found[side][0]["after"] = statistics.mean(after)
                say(f"  {rows} x {length} tokens, round {number}, {side}: {tokens / seconds:.0f} adapter-tokens/s, "
                    f"{tokens / cpu:.0f} per CPU s")  # fmt: skip
                if side == "peer" and number == 0:
                    before = events[0]["before"]
        losses = {side: found[side][0]["after"] for side in found}
        say(f"check: mean loss of the adapters on the rows they train on, {before:.3f} before, after "
            f"{size.pace + 1} steps: {', '.join(f'{side} {loss:.3f}' for side, loss in losses.items())}")  # fmt: skip
        if max(losses.values()) - min(losses.values()) > LIKE * (before - max(losses.values())):
            sys.exit("The two sides do not do the same work.")
        print_rates(found, f"{rows} x {length} tokens an adapter in a step", how, target)


def print_rates(
    found: Mapping[str, Sequence[Mapping[str, float]]], what: str, how: tuple[str, int], target: float
) -> None:
    print(f"\n(c) Eight adapters, {what}")
    print(f"    peer: Trainer and PEFT, {how[0]}, {how[1]} thread(s), an adapter after the other on a loaded base; the "
          "first step of each is left out, and all rows are equally long, so that nothing is padded")  # fmt: skip
    print(f"    ours: packs in {CORES} processes of one thread: 8 adapters in all (4 a process), and twice as many")
    for side, rounds in found.items():
        print(
            f"    {side}: {median(rounds, 'wall'):.0f} adapter-tokens/s, {median(rounds, 'cpu'):.0f} per CPU s, medians"
        )
    for side in list(found)[1:]:
        for kind in ("wall", "cpu"):
            ratios = [mine[kind] / peer[kind] for peer, mine in zip(found["peer"], found[side], strict=True)]
            print_ratio(f"{side} against the peer, {kind}", ratios, target if side == "ours" else None)


def even_rows(bench: Bench, length: int) -> Path:
    """Rows of exactly so many tokens: real ones, their prompts cut from the left."""
    cut = []
    for ids, prompt in json.loads(make_world(bench, 3000).rows.read_text())["train"]:
        answer = len(ids) - prompt
        if len(ids) >= length and answer <= length // 2:
            cut.append((ids[-length:], length - answer))
    path = bench.home / f"rows-of-{length}.json"
    path.write_text(json.dumps({"train": cut[:64]}))
    return path


def packs(
    bench: Bench, rows: Path, adapters: Sequence[Mapping[str, Any]], steps: int, *, each: int
) -> list[dict[str, Any]]:
    """A job for each core; `each` adapters in it."""
    shared = {"base": str(bench.base.folder), "dtype": bench.base.dtype, "rows": str(rows), "steps": 1 + steps}
    return [
        shared | {"adapters": [adapters[(core * each + k) % len(adapters)] for k in range(each)]}
        for core in range(CORES)
    ]


def ours_pack(job: Mapping[str, Any]) -> None:
    """A pack as a search worker trains it; begins when the others are ready too."""
    import numpy as np
    import torch

    from pipelines.data.tokenise import Tokens
    from pipelines.tuning.trainer import Member, Outcome, Trainer

    torch.set_num_threads(1)
    rows = json.loads(Path(job["rows"]).read_text())["train"]
    tokens = Tokens(
        ids=np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows]),
        offsets=np.cumsum([0] + [len(ids) for ids, _ in rows]),
        prompt_lengths=np.asarray([prompt for _, prompt in rows], np.int32),
        too_long=0,
        digest="",
    )
    model = bases.load_model(Path(job["base"]), job["dtype"])
    model.set_attn_implementation("eager")  # as the worker does for short rows
    trainer = Trainer(model, tokens, tokens, pad=model.config.pad_token_id or 0)
    members = []
    for number, params in enumerate(job["adapters"]):
        folder = Path(tempfile.mkdtemp(dir=os.environ["TUNESMITH_HOME"]))
        members.append(Member(params=params, seed=number, start=None, init_adapter=None, save_to=folder))
    clock: list[float] = []

    def lost() -> frozenset[int]:
        clock.append(time.time())  # asked before each step, and then before each batch of the validation
        return frozenset()

    print("ready", flush=True)
    sys.stdin.readline()
    outcomes = trainer.run(members, total_steps=job["steps"], until=job["steps"], lost=lost)
    values = [outcome.value for outcome in outcomes if isinstance(outcome, Outcome)]
    if len(values) != len(members):
        sys.exit(f"not all of the pack came through: {outcomes}")
    each = len(rows[0][0]) * job["adapters"][0]["per_device_train_batch_size"]
    say_json(begun=clock[1], ended=clock[job["steps"]], after=values, tokens=each * len(members) * (job["steps"] - 1))


# --- (d): logging ---

WAYS = ("ours", "log_metric", "asynchronous", "buffered", "log_batch")
MINUTES = ("log_metric", "asynchronous")  # take minutes a round, and part in every other one


def compare_logging(bench: Bench) -> None:
    """A study's curves in MLflow, by our way and by MLflow's own, each read back through MLflow's API."""
    size = bench.size
    curves = [[4.0 / (1 + n + step / 100) for step in range(size.logged_steps)] for n in range(size.logged_trials)]
    found: dict[str, dict[int, dict[str, float]]] = {way: {} for way in WAYS}
    with mlflow_server(bench):
        for number in range(size.rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                if number % 2 and way in MINUTES:
                    continue
                job = {"experiment": f"{way}-{number}", "way": way, "curves": curves, "params": ONE}
                begun, ended = bench.ours("log", job) if way == "ours" else bench.peer("log", job)
                check_that_all_is_there(job["experiment"], curves)
                seconds, cpu = ended["at"] - begun["at"], bench.meter.between(begun["at"], ended["at"])
                found[way][number] = {"wall": seconds, "cpu": cpu}
                say(f"  round {number} {way}: {seconds:.2f} s, {cpu:.2f} CPU s, all points are there")
    print(f"\n(d) Logging: {size.logged_trials} trials x {size.logged_steps} steps, until all is visible in MLflow "
          "(one server process on PostgreSQL; CPU of client, server and database)")  # fmt: skip
    print("    asynchronous and buffered: log_metric(synchronous=False) and a flush, the latter with "
          "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS=1; log_batch: one call a trial; ours: one a rung")  # fmt: skip
    for way in WAYS:
        rounds = list(found[way].values())
        print(f"    {way}: {median(rounds, 'wall'):.2f} s, {median(rounds, 'cpu'):.2f} CPU s, medians of {len(rounds)}")
    for way, target in (("log_metric", 30), ("asynchronous", 1), ("buffered", 1), ("log_batch", 1)):
        for kind in ("wall", "cpu"):
            ratios = [peer[kind] / found["ours"][number][kind] for number, peer in found[way].items()]
            print_ratio(f"{way} against ours, {kind}", ratios, target)


@contextlib.contextmanager
def mlflow_server(bench: Bench) -> Iterator[None]:
    """MLflow as `tunesmith up` starts it; its address in the environment."""
    port = ports.free()
    service = services.mlflow(get_settings(), port, os.environ | {"OMP_NUM_THREADS": "1"})
    log = bench.home / "mlflow.log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return service.start(file)

    with started(start, service.ready, "MLflow", log):
        os.environ["MLFLOW_TRACKING_URI"] = str(service.url)
        try:
            yield
        finally:
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def check_that_all_is_there(experiment: str, curves: Sequence[Sequence[float]]) -> None:
    """Every point of every trial is in MLflow, once, with its step and value."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([number])}
    for trial, curve in enumerate(curves):
        points = client.get_metric_history(runs[f"trial {trial}"], "train_loss")
        if sorted((p.step, p.value) for p in points) != list(enumerate(curve, 1)):
            sys.exit(f"{experiment}: trial {trial} has not all of its {len(curve)} points, but {len(points)}.")
        last = client.get_run(runs[f"trial {trial}"])
        if last.data.metrics["validation_loss"] != curve[-1] or last.data.params["r"] != str(ONE["r"]):
            sys.exit(f"{experiment}: trial {trial} has not its validation loss or its parameters.")


def ours_log(job: Mapping[str, Any]) -> None:
    """As the search's coordinator does it: a run a trial, its points in a batch a rung."""
    from registry import mlflow

    experiment = job["experiment"]
    parent = mlflow.start_run(experiment, "study")
    say_json()
    for number, curve in enumerate(job["curves"]):
        run = mlflow.start_run(
            experiment, f"trial {number}", parent=parent, params=job["params"], key=f"{experiment}/{number}",
            tags={"tunesmith.study": experiment, "tunesmith.trial": str(number)},
        )  # fmt: skip
        begun = 0
        for steps in rungs(len(curve), number=3, reduction=3):
            points = [("train_loss", curve[step], step + 1) for step in range(begun, steps)]
            points.append(("validation_loss", curve[steps - 1], steps))
            mlflow.log_points(run, points, at_ms=int(time.time() * 1000))
            begun = steps
        mlflow.set_tags(run, {"tunesmith.outcome": "complete", "tunesmith.error": ""})
        mlflow.end_run(run)
    mlflow.end_run(parent)
    say_json()


# --- the whole ---


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


OURS: dict[str, Callable[[Mapping[str, Any]], None]] = {"search": ours_search, "pack": ours_pack, "log": ours_log}


def main() -> None:
    if sys.argv[1:2] == ["--ours"]:
        OURS[sys.argv[2]](json.loads(Path(sys.argv[3]).read_text()))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the home is cleared away then too
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="minutes instead of hours: less of everything")
    parser.add_argument("--seeds", type=int, help="how many independent repetitions (5; short: 1)")
    parser.add_argument("--base", default="builtin:smollm2-135m", help="another base, to try parts c and d quickly")
    parser.add_argument("--keep", type=Path, help="keep the figures of (a) and (b) here, and go on where they end")
    parser.add_argument("--part", choices=["a", "b", "c", "d"], action="append", help="only this one; may be repeated")
    asked = parser.parse_args()
    size = SHORT if asked.short else LONG
    if asked.seeds:
        size = replace(size, seeds=asked.seeds, rounds=asked.seeds)
    parts = asked.part or ["a", "b", "c", "d"]
    with prepared(size, asked.base) as bench:
        if {"a", "b"} & set(parts):
            compare_searches(bench, parts, asked.keep)
        if "c" in parts:
            compare_rates(bench)
        if "d" in parts:
            compare_logging(bench)


if __name__ == "__main__":
    main()
