"""The search against the loop that people write: Optuna, transformers' Trainer and PEFT, and MLflow's own logging.

    .venv/bin/python tests/benchmarks/search.py [--short] [--seeds N] [--part a|b|c|d|profile] [--keep FILE]

Parts: (a) time and CPU seconds until our search has a validation loss at or below the peer's final best one, against
the plain loop in fp32; (b) against the same loop with Hyperband and bf16 (fp32 where that is faster); (c)
adapter-tokens a second with eight adapters; (d) what logging costs a study; and where the time of a search of ours
goes. Both sides run by turns, on the same
rows, space, sampler and cores; what they did is checked first. No time is asserted: a figure is printed, with the
target it has. Run it alone. A seed of (a) and (b) takes up to half an hour; with `--keep` its
figures are kept, and the same command goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _search_bench import (
    CORES,
    LIKE,
    LONG,
    MAX_TOKENS,
    ONE,
    PRECISIONS,
    SHORT,
    SPACE,
    Bench,
    Size,
    World,
    fastest,
    make_world,
    median,
    prepared,
    print_ratio,
    say,
    say_json,
)
from _search_logging import compare_logging, ours_log
from _search_rates import compare_rates, ours_pack

from infra.db import transaction
from pipelines.config_space import order
from pipelines.tuning.spec import StudySpec
from registry import studies
from registry.statistics import sign_test

PARTS = ("a", "b", "profile", "c", "d")
RESCORED = 0.02  # nats that a claimed validation loss may differ by from the common scorer's, in fp32


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
        self.file, as_json = file, json.loads(json.dumps(asdict(size)))
        self.size = {name: value for name, value in as_json.items() if name not in ("seeds", "rounds")}
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
        max_tokens=MAX_TOKENS, trials=size.trials + size.more, rungs=size.rungs, reduction=3, finalists=2, space=SPACE,
        seed=world.seed, workers=CORES,
    )  # fmt: skip
    spec = replace(spec, **other)
    (best,) = bench.ours("search", spec.to_json())
    with transaction() as conn:
        jobs = studies.jobs(conn, spec.study, curves=True)
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
          "reduction 3 and two finalists, which are the defaults; TPE draws near a third of few results where Optuna's "
          "draws near a tenth; both clocks from process start")  # fmt: skip
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


def profile(bench: Bench) -> None:
    """Where the time of as many trials of ours as the peer runs goes, on the rows of seed 0."""
    size, world = bench.size, make_world(bench, 0)
    run = run_ours(bench, world, study="profile", trials=size.trials)
    with transaction() as conn:
        jobs, row = studies.jobs(conn, "profile"), studies.get(conn, "profile")
    busy, first = sum(j.seconds or 0.0 for j in jobs), math.inf
    for lead in {j.pack for j in jobs if j.rung == 0}:  # a member's seconds are its share of its pack's
        pack = [j for j in jobs if j.rung == 0 and j.pack == lead]
        first = min(first, max(j.updated_at for j in pack).timestamp() - sum(j.seconds or 0.0 for j in pack))
    members = [j.params for j in jobs if j.rung == 0][: row["adapters_per_pass"]]
    job = {"base": str(bench.base.folder), "dtype": bench.base.dtype, "rows": str(world.rows), "steps": 1 + size.pace}
    events = bench.ours("pack", *[job | {"adapters": members}] * CORES)
    step = statistics.mean((e["ended"] - e["begun"]) / size.pace for e in events) / len(members)
    validation = statistics.mean(e["validated"] for e in events) / len(members)
    print(f"\n(profile) Our search alone: {size.trials} trials, {run.about}; {run.ended - run.launched:.1f} s")
    print(f"    until the first trial begins (imports, base, tokens, adapters a pass): {first - run.launched:.1f} s")
    for rung, steps in enumerate(size.rungs):
        here = [j for j in jobs if j.rung == rung]
        each = steps - (size.rungs[rung - 1] if rung else 0)
        seconds = sum(j.seconds or 0.0 for j in here)
        print(f"    to step {steps:2d}: {len(here):2d} trials x {each:2d} steps in "
              f"{len({j.pack for j in here})} packs, {seconds:.1f} s of a worker")  # fmt: skip
    print(f"    a pack of {len(members)}, both cores busy: {step:.3f} s an adapter's step of "
          f"{SPACE['per_device_train_batch_size']} rows, {validation:.3f} s an adapter's validation on "
          f"{size.validation} rows, about {len(jobs) * validation / busy:.0%} of the workers' time")  # fmt: skip
    idle = CORES * (run.ended - first) - busy
    print(f"    workers without work, and results being written: {idle:.1f} s of {CORES * (run.ended - first):.1f}")


def ours_search(job: Mapping[str, Any]) -> None:
    from pipelines.tuning.search import search

    best = search(StudySpec.from_json(dict(job)), progress=lambda *_: None)
    say_json(**best.to_json())


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
    parser.add_argument("--part", choices=[*PARTS], action="append", help="only this one; may be repeated")
    asked = parser.parse_args()
    size = SHORT if asked.short else LONG
    if asked.seeds:
        size = replace(size, seeds=asked.seeds, rounds=asked.seeds)
    parts = asked.part or PARTS
    with prepared(size, asked.base) as bench:
        if {"a", "b"} & set(parts):
            compare_searches(bench, parts, asked.keep)
        if "profile" in parts:
            profile(bench)
        if "c" in parts:
            compare_rates(bench)
        if "d" in parts:
            compare_logging(bench)


if __name__ == "__main__":
    main()
