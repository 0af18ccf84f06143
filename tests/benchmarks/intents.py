"""Canaries of real versions: the one that is sound serves at the end, the one made worse on purpose takes itself back.

    .venv/bin/python tests/benchmarks/intents.py [--short] [--intents FOLDER] [--database URL]

The whole stack (`tunesmith up`) on a home of its own, on the embedded PostgreSQL or a server at URL (any database of
it, by a role that may create databases; those it makes begin with tunesmith_bench_). Three runs train a model that
names the intent of a request: version 1, which serves; version 2 with other trials; and version 3, which learned and
was tested on rows half of whose intents were given to others, so that its own gates, against the base, pass. Versions 2
and 3 begin as canaries in steps. Applications ask test rows without a pause, and say of each answer whether it was
right (`POST /v1/feedback`). No person acts. The program fails unless 2 was promoted and 3 taken back, with no request
lost. FOLDER has files as those of CLINC150, in chat form: `*_train.jsonl` and `*_test.jsonl`; without one, the "intent"
of a function's signature is the module of the standard library that it is from.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
from psycopg import sql

from pipelines.docstrings import standard_library

MODEL, CLIENTS = "intents", 4
SYSTEM = "Name the intent of the user's request in one label."
SECONDS = 1800  # that a canary may take
DATABASES = ("tunesmith", "mlflow", "optuna", "prefect")
PREFIX = "tunesmith_bench_"


@dataclass(frozen=True)
class Row:
    text: str
    intent: str


@dataclass(frozen=True, kw_only=True)
class Size:
    intents: int
    rows: int  # of an intent, to learn from
    steps: int
    shares: str
    requests: int  # of a canary's, that a step takes


LONG = Size(intents=12, rows=50, steps=120, shares="10%, 25%, 50%", requests=60)
SHORT = Size(intents=6, rows=40, steps=60, shares="25%, 50%", requests=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer intents, rows and requests")
    parser.add_argument("--intents", type=Path, help="a folder with the files of CLINC150")
    parser.add_argument("--database", help="the address of a PostgreSQL server, instead of the embedded one")
    asked = parser.parse_args()
    size = SHORT if asked.short else LONG
    learn, test = rows(asked.intents, size)
    with home(asked.database) as folder:
        write(folder / "rows.jsonl", learn)
        write(folder / "wrong.jsonl", mixed_up(learn))
        command("up", "--detach")
        try:
            play(folder, size, test)
        finally:
            command("down")


def play(folder: Path, size: Size, test: Sequence[Row]) -> None:
    ready = command("status", "--json")
    print("services: " + ", ".join(f"{s['name']} {s['state']}" for s in ready["services"]))
    train(folder, size, "rows.jsonl", seed=0, promote="when_gates_pass")
    key = command("keys", "create", "--role", "service", "--name", "bench", "--json")["key"]
    [url] = [s["url"] for s in ready["services"] if s["name"] == "gateway"]
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=120, trust_env=False) as http:
        until("the gateway to serve version 1", lambda: ask(http, test[0])[0] == 200, 180)
        for number, file, seed, end in ((2, "rows.jsonl", 1, "promoted"), (3, "wrong.jsonl", 2, "taken_back")):
            train(folder, size, file, seed=seed, promote="canary")
            with traffic(http, test) as found:
                until(f"the end of version {number}'s canary", partial(ended, number), SECONDS)
            now = command("rollout", MODEL, "--json")
            told(number, now, found)
            if now["state"] != end or any(status != 200 for status, _, _ in found):
                sys.exit(f"That must not be: {now['state']}, and {Counter(status for status, _, _ in found)}.")
    serving = [v["version"] for v in command("versions", MODEL, "--json")["versions"] if v["serving"] == "champion"]
    print(f"version {serving[0]} serves")
    if serving != [2]:
        sys.exit("That must not be.")


def told(number: int, now: dict[str, Any], found: Sequence[tuple[int, str, bool]]) -> None:
    right = {v: [ok for _, by, ok in found if by == v] for v in sorted({by for _, by, _ in found})}
    shares = ", ".join(f"{v} right in {sum(oks)} of {len(oks)}" for v, oks in right.items())
    print(f"version {number}: {now['state']} at step {now['step'] + 1} of {len(now['plan']['steps'])}, {now['said']}")
    print(f"  {len(found)} requests, {sum(status != 200 for status, _, _ in found)} failed; {shares}", flush=True)


def ended(number: int) -> bool:
    now = command("rollout", MODEL, "--json")
    return now["version"] == number and now["state"] != "running"


@contextmanager
def traffic(http: httpx.Client, test: Sequence[Row]) -> Iterator[list[tuple[int, str, bool]]]:
    """Applications that ask, and say what the answer was worth: status, version, and whether it was right."""
    found: list[tuple[int, str, bool]] = []
    stopping = threading.Event()

    def go(first: int) -> None:
        number = first
        while not stopping.is_set():
            row = test[number % len(test)]
            number += CLIENTS
            status, version, request, said = ask(http, row)
            right = said == row.intent
            found.append((status, version, right))
            if status == 200:
                http.post("/v1/feedback", json={"request_id": request, "score": 1 if right else -1}).raise_for_status()

    threads = [threading.Thread(target=go, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def ask(http: httpx.Client, row: Row) -> tuple[int, str, str, str]:
    answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": chat(row)[:-1]})
    said = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else ""
    head = answer.headers
    return answer.status_code, head.get("x-tunesmith-version", ""), head.get("x-request-id", ""), said.strip()


def train(folder: Path, size: Size, file: str, *, seed: int, promote: str) -> None:
    path = folder / f"{promote}-{seed}.yaml"
    path.write_text(f"""
model: {MODEL}
base: builtin:smollm2-135m
data: {{train: {file}, split: {{test: 0.15}}, quality: {{max_tokens: 128}}}}
generation: {{max_tokens: 12, temperature: 0}}
tuning:
  trials: 2
  seed: {seed}
  max_steps: {size.steps}
  warm_start: false
  validation_rows: 48
  space: {{r: 16, learning_rate: [5e-4, 1e-3], target_modules: all-linear, per_device_train_batch_size: 8}}
evaluation: {{suites: [quality], limit: 60}}
gates: [{{metric: exact_match, against: base, must: better}}]
promote: {promote}
rollout: {{steps: [{size.shares}], min_requests: {size.requests}, min_time: 20s}}
""")
    begun = time.monotonic()
    found = command("run", "-c", str(path), "--json")
    exact = found["evaluation"]["metrics"]["exact_match"]["candidate"]["estimate"]
    print(
        f"version {found['version']} from {file}: {exact:.0%} of its own test rows right, "
        f"gate {found['gate']['decision']}, {(time.monotonic() - begun) / 60:.1f} minutes",
        flush=True,
    )


# --- rows ---


def rows(folder: Path | None, size: Size) -> tuple[list[Row], list[Row]]:
    """To learn from, and to ask: of the intents that come first by name where there are rows enough."""
    learn, test = modules() if folder is None else (read(folder, "*_train.jsonl"), read(folder, "*_test.jsonl"))
    counts = Counter(row.intent for row in learn)
    chosen = [intent for intent in sorted(counts) if counts[intent] >= size.rows][: size.intents]
    if len(chosen) < size.intents:
        sys.exit(f"{len(chosen)} intents have {size.rows} rows; {size.intents} are needed.")
    learn = [row for intent in chosen for row in [r for r in learn if r.intent == intent][: size.rows]]
    test = [row for row in test if row.intent in chosen]
    random.Random(3).shuffle(learn)
    random.Random(4).shuffle(test)
    return learn, test


def read(folder: Path, name: str) -> list[Row]:
    [file] = [file for file in folder.glob(name) if "oos" not in file.name]
    found = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    return [Row(messages[-2]["content"], messages[-1]["content"]) for messages in found]


def modules() -> tuple[list[Row], list[Row]]:
    found = [Row(p.signature.removeprefix(f"{p.module}."), p.module.partition(".")[0]) for p in standard_library()]
    random.Random(5).shuffle(found)
    part = len(found) * 3 // 4
    return found[:part], found[part:]


def mixed_up(learn: Sequence[Row]) -> list[Row]:
    """Every other intent has the name of the next one of those."""
    names = sorted({row.intent for row in learn})[::2]
    wrong = dict(zip(names, names[1:] + names[:1], strict=True))
    return [Row(row.text, wrong.get(row.intent, row.intent)) for row in learn]


def chat(row: Row) -> list[dict[str, str]]:
    said = (("system", SYSTEM), ("user", row.text), ("assistant", row.intent))
    return [{"role": role, "content": content} for role, content in said]


def write(path: Path, found: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps({"messages": chat(row)}) + "\n" for row in found))


# --- the stack ---


@contextmanager
def home(database: str | None) -> Iterator[Path]:
    for name in [n for n in os.environ if n.startswith(("TUNESMITH_", "MLFLOW_", "PREFECT_", "OTEL_", "PG"))]:
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-bench-"))
    folder.chmod(0o755)  # as root PostgreSQL runs as another user
    os.environ["TUNESMITH_HOME"] = str(folder)
    if database is not None:
        os.environ |= {"TUNESMITH_DATABASE_URL": database, "TUNESMITH_DATABASE_PREFIX": PREFIX}
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if database is not None:
            with psycopg.connect(database, autocommit=True) as conn:
                for name in DATABASES:
                    drop = sql.SQL("drop database if exists {} with (force)")
                    conn.execute(drop.format(sql.Identifier(PREFIX + name)))


def command(*arguments: str) -> dict[str, Any]:
    """A command as a person gives it; its JSON, where it is asked for."""
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).decode()[-2000:]
        sys.exit(f"`tunesmith {' '.join(arguments)}` ended with {done.returncode}:\n{said}")
    return dict(json.loads(done.stdout)) if "--json" in arguments else {}


def until(what: str, look: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not look():
        if time.monotonic() > end:
            sys.exit(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(1)


if __name__ == "__main__":
    main()
