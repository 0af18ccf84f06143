"""Promotions against MLflow's own alias calls, on one PostgreSQL; listing and comparing at ten thousand versions.

    .venv/bin/python tests/benchmarks/promotions.py [--short] [--rounds N]

Sixteen clients over HTTP: ours `PATCH /api/v1/models/{m}/deployment` of `tunesmith serve`, one process; MLflow's
`registered-models/alias` of its server with a worker a core, on uvloop. Both write through to the disk. Two shapes:
each client its own model, and all of them one model, whose alias is new in each round. What is refused is counted and
tried again until it is done. The sides take turns; after each round it is checked that both hold what was
acknowledged: MLflow its last alias, we an entry of the ledger for each promotion. No time is asserted: a figure is
printed, with the target it has. Run it alone.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import psycopg
from _home import cpu_seconds, gateway, mlflow, temporary_home
from psycopg.types.json import Jsonb

from deploy.auth import create_key
from infra.db import load_queries, transaction
from infra.settings import get_settings
from infra.web import ask
from registry import deployments, versions

ROOT = Path(__file__).parents[2]
CLIENTS = 16
VERSIONS = 10_000
SIDES = ("ours", "mlflow")
SHAPES = {"own": "each client its own model", "one": "all clients one model"}
DIGEST = "sha256:" + "d" * 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """`own` and `one` are the promotions of each client in a round."""

    rounds: int
    own: int
    one: int
    reads: int


LONG = Size(rounds=9, own=60, one=12, reads=30)
SHORT = Size(rounds=5, own=12, one=4, reads=9)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a side answers, and the processes whose time is its own."""

    url: str
    key: str
    process: psutil.Process


@dataclass(frozen=True, kw_only=True)
class Round:
    """`seconds` from the first call to the last answer; `waits` in seconds, each from the first try to the answer
    that acknowledged it; `cpu` of the side's server and the database."""

    seconds: float
    waits: list[float]
    refused: Counter[str]
    cpu: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    size: Size
    places: Mapping[str, Place]
    database: psutil.Process

    def call(self, side: str, method: str, path: str, body: Any = None) -> Any:
        return json.loads(self.ask(side, method, path, body))

    def ask(self, side: str, method: str, path: str, body: Any = None) -> bytes:
        place = self.places[side]
        head = {"authorization": f"Bearer {place.key}"} if place.key else {}
        status, text = ask(method, place.url + path, body, headers=head, seconds=60)
        if status >= 300:
            sys.exit(f"{side} answered {status} to {method} {path}: {text[:300]!r}")
        return text

    def spent(self, side: str) -> float:
        """CPU seconds so far of a side's server and of the database, with all their children."""
        return sum(cpu_seconds(each) for each in (self.places[side].process, self.database))


def main() -> None:
    reader = argparse.ArgumentParser(description="Promotions and lists against MLflow's registry.")
    reader.add_argument("--short", action="store_true", help="few calls, to see that all of it works")
    reader.add_argument("--rounds", type=int, help="how often the sides take turns")
    reader.add_argument("--clients", help=argparse.SUPPRESS)  # the process that holds a round's clients
    given = reader.parse_args()
    if given.clients:
        print(json.dumps(_clients(**json.loads(given.clients))))
        return
    size = SHORT if given.short else LONG
    if given.rounds:
        size = Size(**{**vars(size), "rounds": given.rounds})
    with _bench(size) as bench:
        for shape in SHAPES:
            compare_promotions(bench, shape)
        compare_lists(bench)


# --- promotions ---


def compare_promotions(bench: Bench, shape: str) -> None:
    each = getattr(bench.size, shape)
    found: dict[str, list[Round]] = {side: [] for side in SIDES}
    for number in range(bench.size.rounds + 1):
        models = [f"{shape}-{number}-{n}" for n in range(CLIENTS if shape == "own" else 1)]
        for model in models:
            make_model(bench, model, 2 * CLIENTS // len(models))
        ended: dict[str, dict[str, str]] = {}
        for side in SIDES if number % 2 else reversed(SIDES):
            done, told = one_round(bench, side, models, each)
            ended[side] = check(bench, side, models, each, told)
            if number:  # the first round only warms both up
                found[side].append(done)
        if shape == "own" and ended["ours"] != ended["mlflow"]:
            sys.exit(f"The sides did not do the same: {ended}")
    show_promotions(shape, each, found)


def make_model(bench: Bench, model: str, count: int) -> None:
    """The same model and versions on both sides; ours were judged, and passed."""
    with transaction() as conn:
        add_versions(conn, model, count)
    bench.call("mlflow", "POST", "/api/2.0/mlflow/registered-models/create", {"name": model})
    for _ in range(count):
        body = {"name": model, "source": "s3://none/none"}
        bench.call("mlflow", "POST", "/api/2.0/mlflow/model-versions/create", body)


def one_round(bench: Bench, side: str, models: Sequence[str], each: int) -> tuple[Round, list[list[Any]]]:
    """A round, and what each call was told: client, model, version, generation (None of MLflow)."""
    place = bench.places[side]
    job = {"side": side, "url": place.url, "key": place.key, "models": models, "each": each}
    before = bench.spent(side)
    done = subprocess.run(
        [sys.executable, __file__, "--clients", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"The clients of {side} failed:\n{done.stderr[-3000:]}")
    told = json.loads(done.stdout)
    calls = told["calls"]
    if len(calls) != CLIENTS * each:
        sys.exit(f"{side} acknowledged {len(calls)} of {CLIENTS * each} promotions.")
    return Round(
        seconds=max(c["ended"] for c in calls) - min(c["begun"] for c in calls),
        waits=[c["ended"] - c["begun"] for c in calls],
        refused=Counter(told["refused"]),
        cpu=bench.spent(side) - before,
    ), calls


def check(bench: Bench, side: str, models: Sequence[str], each: int, told: list[Any]) -> dict[str, str]:
    """End the benchmark unless what was acknowledged is there; gives each model's version now."""
    if side == "mlflow":
        path = "/api/2.0/mlflow/registered-models/get?name="
        now = {
            model: bench.call(side, "GET", path + model)["registered_model"]["aliases"][0]["version"]
            for model in models
        }
    else:
        acknowledged = Counter((c["model"], c["generation"], int(c["version"])) for c in told)
        with transaction() as conn:
            kept = [entry for model in models for entry in deployments.history(conn, model)]
            problems = [problem for model in models for problem in deployments.verify_chain(conn, model)]
            now = {model: str(deployments.read(conn, model).champion) for model in models}
        if problems or Counter((e.model, e.generation, e.to_version) for e in kept) != acknowledged:
            sys.exit(f"The ledger does not hold exactly what was acknowledged: {problems}")
    if len(models) == CLIENTS:
        for client, model in enumerate(models):
            last = [c["version"] for c in told if c["client"] == client][-1]
            if now[model] != last:
                sys.exit(f"{side} lost the last promotion of {model}: {now[model]}, not {last}.")
    return now


def _clients(side: str, url: str, key: str, models: list[str], each: int) -> dict[str, Any]:
    """All the clients of a round, a thread each; they share a process, so that the machine is the servers'."""
    calls: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    gate = threading.Barrier(CLIENTS)

    def client(number: int) -> None:
        where = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        model, first = models[number % len(models)], 1 if len(models) > 1 else 2 * number + 1
        head = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        generation = 0
        _answer(where, "GET", "/version", None, head)  # connect first
        gate.wait()
        for turn in range(each):
            version = str(first + turn % 2)
            begun = time.perf_counter()
            while True:
                if side == "ours":
                    body = {"champion": int(version), "reason": "the next one"}
                    path, more = f"/api/v1/models/{model}/deployment", {"if-match": str(generation)}
                    status, told = _answer(where, "PATCH", path, body, head | more)
                    if status == 200:
                        generation = told["generation"]
                    elif status == 412:
                        generation = told["error"]["generation"]
                else:
                    body = {"name": model, "alias": "champion", "version": version}
                    status, told = _answer(where, "POST", "/api/2.0/mlflow/registered-models/alias", body, head)
                if status == 200:
                    break
                refused[_why(status, told)] += 1
                if status in (401, 403, 404, 405):
                    sys.stderr.write(f"{side} answered {status}: {told}\n")
                    os._exit(1)
            calls.append(
                {
                    **{"client": number, "model": model, "version": version, "begun": begun},
                    **{"generation": generation if side == "ours" else None, "ended": time.perf_counter()},
                }
            )

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"calls": calls, "refused": refused}


def _why(status: int, told: Any) -> str:
    """A refusal in two words: the status, and the database's error that MLflow passes on."""
    for name in ("UniqueViolation", "SerializationFailure", "DeadlockDetected"):
        if name in str(told):
            return f"{status} {name}"
    return str(status)


def _answer(
    where: http.client.HTTPConnection, method: str, path: str, body: Any, head: Mapping[str, str]
) -> tuple[int, Any]:
    where.request(method, path, None if body is None else json.dumps(body), dict(head))
    answer = where.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else None


def show_promotions(shape: str, each: int, found: Mapping[str, list[Round]]) -> None:
    rates = {side: [len(r.waits) / r.seconds for r in found[side]] for side in SIDES}
    tails = {side: [1000 * _quantile(r.waits, 0.99) for r in found[side]] for side in SIDES}
    costs = {side: [1000 * r.cpu / len(r.waits) for r in found[side]] for side in SIDES}
    counted = {side: sum((r.refused for r in found[side]), Counter()) for side in SIDES}
    total = CLIENTS * each * len(found["ours"])
    say(f"\n{SHAPES[shape]}: {CLIENTS} clients, {each} promotions each, {len(found['ours'])} rounds a side")
    for name, of, better in (
        ("promotions a second", rates, "higher"), ("p99, ms", tails, "lower"), ("CPU, ms a promotion", costs, "lower")
    ):  # fmt: skip
        ours, theirs = statistics.median(of["ours"]), statistics.median(of["mlflow"])
        spread = "  ".join(f"{side} {min(of[side]):.1f}..{max(of[side]):.1f}" for side in SIDES)
        ratio = ours / theirs if better == "higher" else theirs / ours
        say(f"  {name:<22} ours {ours:8.1f}   MLflow {theirs:8.1f}   {ratio:5.2f} times better   ({spread})")
    say(f"  ours: {total} acknowledged, {total} in the ledger, chain whole; refused and tried again: "
        f"{dict(counted['ours']) or 'none'}")  # fmt: skip
    say(f"  MLflow: {total} acknowledged, which of them when is kept nowhere; errors: "
        f"{dict(counted['mlflow']) or 'none'}")  # fmt: skip


# --- lists ---


def compare_lists(bench: Bench) -> None:
    """A model of ten thousand versions, as each side lists them; and two of them compared."""
    with transaction() as conn:
        add_versions(conn, "big", VERSIONS)
        conn.execute("analyze version")
        conn.execute("analyze evidence")
    bench.call("mlflow", "POST", "/api/2.0/mlflow/registered-models/create", {"name": "big"})
    with psycopg.connect(get_settings().database("mlflow"), autocommit=True) as conn:  # by calls it would take minutes
        for name in ("mlflow_versions", "mlflow_tags"):
            conn.execute(SQL[name], {"count": VERSIONS})
        conn.execute("analyze")
    search = f"/api/2.0/mlflow/model-versions/search?filter=name%3D%27big%27&max_results={VERSIONS}"
    ways: dict[str, tuple[str, str]] = {
        "versions": ("ours", "/api/v1/models/big/versions"),
        "compare": ("ours", "/api/v1/compare?a=big:17&b=big:9876"),
        "models": ("ours", "/api/v1/models"),
        "model-versions/search": ("mlflow", search),
    }
    numbers = {v["version"] for v in bench.call("ours", "GET", ways["versions"][1])["versions"]}
    theirs = {int(v["version"]) for v in bench.call("mlflow", "GET", search)["model_versions"]}
    if numbers != set(range(1, VERSIONS + 1)) or theirs != numbers:
        sys.exit("The sides do not list the same versions.")
    say(f"\nat {VERSIONS} versions of a model, over HTTP, {bench.size.reads} times each by turns, ms")
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(bench.size.reads):
        for name, (side, path) in ways.items():
            begun = time.perf_counter()
            bench.ask(side, "GET", path)  # until the whole answer is there
            took[name].append(1000 * (time.perf_counter() - begun))
    for name, (side, _) in ways.items():
        aim = "   target: under 100" if side == "ours" else ""
        shown = f"{side}: {name}"
        say(f"  {shown:<30} median {statistics.median(took[name]):7.1f}   worst {max(took[name]):7.1f}{aim}")


def add_versions(conn: Any, model: str, count: int) -> None:
    """Rows of versions, each with an evaluation and a gate decision of its own, of the size that real ones have."""
    conn.execute(SQL["base"], {"digest": DIGEST})
    conn.execute(versions.SQL["ensure_model"], {"model": model})
    estimate = {"estimate": 0.5, "low": 0.4, "high": 0.6, "level": 0.95, "n": 200, "higher_is_better": True}
    sides = ("candidate", "base", "champion", "vs_base", "vs_champion")
    names = ("exact_match", "loss", "token_f1", "rouge_l", "chrf", "p95_latency_ms", "tokens_per_second")
    params = {f"parameter_{n}": 0.125 * n for n in range(14)}
    histogram = {"edges": [0.1 * n for n in range(40)], "counts": list(range(40))}
    rows = []
    for number in range(1, count + 1):
        metrics = {name: dict.fromkeys(sides, estimate | {"estimate": number / 1e5}) for name in names}
        evaluation = {"metrics": metrics, "rows": 200, "slices": {}, "examples": [{"prompt": "x" * 200}] * 10}
        gate = {"decision": "pass", "reasons": [f"{model}:{number} is not worse: 0.01 [-0.02, 0.03]"], "gates": []}
        base = {"id": "b", "revision": "r", "digest": DIGEST, "dtype": "float32"}
        manifest = {"base": base, "prompt": {"system": "Be brief. " * 20}, "params": params, "generation": {},
                    "dataset": None, "method": "lora", "study": None, "trial": 1, "code_version": "1",
                    "files": {f"file-{n}": DIGEST for n in range(6)}}  # fmt: skip
        rows.append(
            {
                **dict.fromkeys(
                    ("dataset_digest", "study", "run_id", "mlflow_run_id", "mlflow_model_id", "imported_by")
                ),
                **{"model": model, "number": number, "bundle_digest": DIGEST, "base_digest": DIGEST, "method": "lora"},
                "manifest": Jsonb(manifest),
                "metrics": Jsonb(dict.fromkeys(names, number / 1e5)),
                "evaluation": versions.keep_evidence(conn, "evaluation", evaluation) if count > 99 else None,
                "gate": versions.keep_evidence(conn, "gate", gate),
                "profile": Jsonb({f"feature_{n}": histogram for n in range(12)}) if count > 99 else Jsonb({}),
            }
        )
    with conn.cursor() as cursor:
        cursor.executemany(versions.SQL["insert"], rows)


# --- the house ---


@contextmanager
def _bench(size: Size) -> Iterator[Bench]:
    with temporary_home() as (home, port), ExitStack() as stack:
        with transaction() as conn:
            key = create_key(conn, name="bench", role="operator").key
        places = {}
        for side, key_of, serve in (
            ("ours", key, gateway),
            ("mlflow", "", partial(mlflow, workers=os.cpu_count() or 1)),
        ):
            url, child = stack.enter_context(serve(home))
            places[side] = Place(url=url, key=key_of, process=child)
        yield Bench(size=size, places=places, database=_postmaster(port))


def _postmaster(port: int) -> psutil.Process:
    for child in psutil.Process().children():
        if child.name() == "postgres" and str(port) in child.cmdline():
            return child
    sys.exit("The database's process was not found.")


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def say(text: str) -> None:
    print(text, flush=True)


SQL = load_queries(Path(__file__).with_suffix(".sql"))

if __name__ == "__main__":
    main()
