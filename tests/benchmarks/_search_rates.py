"""Part (c) of search.py: adapter-tokens a second of many adapters."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _search_bench import CORES, LIKE, PRECISIONS, SPACE, Bench, fastest, make_world, median, print_ratio, say, say_json

from registry import bases


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
    splits = json.loads(Path(job["rows"]).read_text())

    def tokens_of(rows: Sequence[tuple[list[int], int]]) -> Tokens:
        return Tokens(
            ids=np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows]),
            offsets=np.cumsum([0] + [len(ids) for ids, _ in rows]),
            prompt_lengths=np.asarray([prompt for _, prompt in rows], np.int32),
            too_long=0,
            digest="",
        )

    rows = splits["train"]
    train, validation = tokens_of(rows), tokens_of(splits.get("validation", rows))
    model = bases.load_model(Path(job["base"]), job["dtype"])
    model.set_attn_implementation("eager")  # as the worker does for short rows
    trainer = Trainer(model, train, validation, pad=model.config.pad_token_id or 0)
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
    say_json(
        begun=clock[1], ended=clock[job["steps"]], after=values, tokens=each * len(members) * (job["steps"] - 1),
        validated=time.time() - clock[job["steps"]],
    )  # fmt: skip
