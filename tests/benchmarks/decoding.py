"""Decoding on many adapters at once: our engine's batch against PEFT, one request at a time and with `adapter_names`.

    .venv/bin/python tests/benchmarks/decoding.py [--short] [--threads 1|2]

Eight requests on eight LoRA adapters (rank 16, all linear layers) of SmolLM2-135M, greedy, to the same number of new
tokens. First, in fp32, all three sides must answer with the same tokens. Then they are timed by turns in the dtype in
which each is fastest, the peer with one and with two threads; ours has the threads of an engine (one) unless told
otherwise. No time is asserted: figures are printed, with the targets they have. Run it alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _home import temporary_home

from deploy.adapters import Adapters
from deploy.decoding import Request, generate, open_model
from deploy.sampling import Sampling
from infra.settings import get_settings
from registry import bases
from registry.prompts import render

PROMPTS = (
    "Write a one-line summary of a function that adds two numbers.",
    "What is the capital of France, and why do people visit it?",
    "def read(path, encoding='utf-8'): explain what this function does.",
    "My parcel has not arrived yet. Where is it?",
    "Translate to French: good morning, how are you today?",
    "List three uses of a hammer, in order of importance.",
    "I was charged twice for the same order. What should I do now?",
    "Explain in one sentence what a database index is good for.",
)
TARGETS = {"one at a time": 4.0, "adapter_names": 1.4}


@dataclass(frozen=True, kw_only=True)
class Side:
    """A way to answer all requests: gives the tokens of each, and is timed."""

    name: str
    dtype: str
    answer: Callable[[], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1, help="of our side")
    parser.add_argument("--base", default="builtin:smollm2-135m")
    options = parser.parse_args()
    tokens, rounds = (16, 2) if options.short else (64, 5)
    with temporary_home() as home:
        folders = [home.folder / f"adapter-{n}" for n in range(len(PROMPTS))]
        base = bases.resolve(options.base)
        save_adapters(base.folder, folders)
        answers = {side.name: side.answer() for side in sides(base.folder, folders, "float32", min(tokens, 24))}
        ours = answers.pop("ours")
        for name, theirs in answers.items():
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            print(f"check, fp32: {same} of {len(ours)} answers equal those of PEFT, {name}")
            if name == "one at a time" and same < len(ours):
                raise SystemExit("Ours is not what PEFT answers: nothing is timed.")
        timed = [
            (side, threads)
            for dtype in ("float32", "bfloat16")
            for side in sides(base.folder, folders, dtype, tokens)
            for threads in ((options.threads,) if side.name == "ours" else (1, 2))
        ]
        rates: dict[tuple[str, str, int], list[float]] = {}
        cpu: dict[tuple[str, str, int], list[float]] = {}
        for turn in range(rounds + 1):
            for side, threads in timed:
                torch.set_num_threads(threads)
                wall, busy = time.perf_counter(), time.process_time()
                made = sum(len(answer) for answer in side.answer())
                wall, busy = time.perf_counter() - wall, time.process_time() - busy
                if turn:  # the first warms caches up
                    key = (side.name, side.dtype, threads)
                    rates.setdefault(key, []).append(made / wall)
                    cpu.setdefault(key, []).append(made / busy)
            print(f"round {turn} of {rounds}" if turn else "warmed up", flush=True)
    for key, values in rates.items():
        name, dtype, threads = key
        print(
            f"{name}, {dtype}, {threads} thread(s): {statistics.median(values):.1f} tokens/s, "
            f"{statistics.median(cpu[key]):.1f} a CPU second"
        )
    best = max(statistics.median(values) for key, values in rates.items() if key[0] == "ours")
    for name, target in TARGETS.items():
        theirs = max(statistics.median(values) for key, values in rates.items() if key[0] == name)
        print(f"ours / PEFT {name}, each in its best form: {best / theirs:.2f} (target {target:g})")
        like = [key for key in rates if key[0] == name and key[2] == options.threads]
        theirs = max(statistics.median(rates[key]) for key in like)
        print(f"  with the same threads: {best / theirs:.2f}")


def sides(base: Path, folders: Sequence[Path], dtype: str, tokens: int) -> list[Side]:
    """The three ways, each on a model of its own, in this dtype."""
    model, tokenizer = open_model(base, dtype)
    adapters = Adapters(model, max_rank=get_settings().max_lora_rank)
    names = [folder.name for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        adapters.load(name, folder)
    prompts = [render(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    requests = [Request(prompt=i, adapter=name, sampling=sampling) for i, name in zip(ids, names, strict=True)]

    def ours() -> list[list[int]]:
        return [
            list(result.tokens) for result in generate(model, tokenizer, adapters, requests, max_rows=len(requests))
        ]

    peft = _peft(base, folders, dtype)
    padded = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    how: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip

    def one_at_a_time() -> list[list[int]]:
        found = []
        for name, i in zip(names, ids, strict=True):
            peft.set_adapter(name)
            given = torch.tensor([i])
            with torch.inference_mode():
                made = peft.generate(input_ids=given, attention_mask=torch.ones_like(given), **how)
            found.append(made[0, len(i) :].tolist())
        return found

    def mixed() -> list[list[int]]:
        with torch.inference_mode():
            made = peft.generate(**padded, adapter_names=names, **how)
        return [row[padded["input_ids"].shape[1] :].tolist() for row in made]

    return [
        Side(name="ours", dtype=dtype, answer=ours),
        Side(name="one at a time", dtype=dtype, answer=one_at_a_time),
        Side(name="adapter_names", dtype=dtype, answer=mixed),
    ]


def save_adapters(base: Path, folders: Sequence[Path]) -> None:
    """Adapters of PEFT's own random values, of which none is zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    for folder in folders:
        config = LoraConfig(
            r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        get_peft_model(bases.load_model(base, "float32"), config).save_pretrained(folder)


def _peft(base: Path, folders: Sequence[Path], dtype: str) -> Any:
    from peft import PeftModel

    first, *others = folders
    model = PeftModel.from_pretrained(bases.load_model(base, dtype), first, adapter_name=first.name)
    for folder in others:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval()


if __name__ == "__main__":
    main()
