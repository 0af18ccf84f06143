"""Everything once, on text that every machine has: the documentation of Python and of three libraries.

A thin script over what a person uses: one YAML file, the `tunesmith` commands, and requests to the gateway.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from infra.console import err, out, safe
from infra.errors import TunesmithError
from infra.settings import get_settings
from pipelines.docstrings import Pair
from pipelines.tuning.defaults import FIXED

MODEL = "docstring-writer"
NEW_WORLD = (
    "numpy", "numpy.linalg", "numpy.fft", "numpy.ma", "numpy.random", "torch", "torch.nn.functional", "torch.linalg",
    "torch.special", "pandas",
)  # fmt: skip
SYSTEM = "Write the one-line docstring of this Python function."


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything; the quick one is for a tiny model. `limit` is so small that version 2 is judged on as
    many rows of the new world as of the old one: its drift's reference is then of the same mixture as the traffic."""

    base: str
    train: int
    test: int
    requests: int
    tuning: str
    retrain: str
    limit: int
    batch: int


FULL = Size(
    base="builtin:smollm2-135m", train=800, test=80, requests=200, limit=90, batch=4,
    tuning="trials: 8\n  max_steps: 45\n  pruning: {reduction: 3, rungs: 3}\n  validation_rows: 48",
    retrain="trials: 4",
)  # fmt: skip
QUICK = Size(
    base="builtin:tiny", train=1500, test=150, requests=200, limit=110, batch=8,
    tuning="trials: 8\n  max_steps: 180\n  pruning: {reduction: 3, rungs: 3}",
    retrain="trials: 4",
)  # fmt: skip


def demo(*, quick: bool, detach: bool) -> None:
    """Run the demo on this home's stack; starts the stack when it is down, and stops it at the end unless `detach`.

    Raises TunesmithError with the sentence of the step that failed.
    """
    size = QUICK if quick else FULL
    begun = time.monotonic()
    started_here = _start_stack()
    try:
        report = _play(size)
        _show(report, seconds=time.monotonic() - begun)
        if not detach and started_here:
            err.print("The stack stays up until Ctrl-C.")
            threading.Event().wait()
    finally:
        if not detach and started_here:
            subprocess.run(_command("down"), check=False)


def _start_stack() -> bool:
    running = subprocess.run(_command("status", "--json"), capture_output=True, check=False).returncode == 0
    if not running:
        _step("Starting PostgreSQL, MLflow, Prefect, the gateway and the watcher")
        done = subprocess.run(_command("up", "--detach"), stdout=sys.stderr, check=False)
        if done.returncode:
            raise TunesmithError("The stack did not start.", hint="See `tunesmith doctor`.")
    get_settings.cache_clear()
    return not running


def _play(size: Size) -> dict[str, Any]:
    report: dict[str, Any] = {}
    folder = get_settings().home / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    client = Client(_tunesmith("keys", "create", "--role", "service", "--name", "demo")["key"])

    _step("Reading the standard library's documentation")
    old, new, config = _write_files(folder, size)
    err.print(f"{size.train + size.test} rows to learn from, {len(old)} and {len(new)} kept for traffic")

    _step(f"Tuning on {size.base}: prepare, search, evaluate, register, promote")
    report["first"] = _tunesmith("run", "-c", str(config), show=True)
    first = report["first"]["version"]
    if not report["first"]["promoted"]:
        raise TunesmithError(f"Version {first} was not promoted: {'; '.join(report['first']['gate']['reasons'])}")

    _step("Traffic of the same kind")
    traffic = _Traffic(client)
    _until("the gateway to serve version 1", lambda: client.is_ready(old[0]), 180)
    traffic.send(old[: size.requests])
    report["quiet"] = _drift(first, "stable")

    _step("Traffic from another world: numpy, torch, pandas")
    foreign = traffic.send(new[: size.requests])
    report["moved"] = _drift(first, "drift")
    err.print(safe(report["moved"]["explanation"]))
    report["alerts"] = _until("an alert", lambda: _tunesmith("alerts")["alerts"], 60)
    for alert in report["alerts"]:
        err.print(f"alert: {safe(alert['message'])}")

    _step("The true docstrings arrive as corrections; the verdict starts the retrain flow")
    corrections = folder / "corrections.jsonl"
    lines = [{"request_id": i, "score": -1, "correction": p.summary} for i, p in foreign]
    corrections.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _tunesmith("feedback", MODEL, str(corrections))
    second = _await_retrain(first)
    report["second"] = _result(second)

    _step(f"The same mixed traffic, answered by version {second}")
    half = size.requests // 2
    mixed = old[size.requests : size.requests + half] + new[size.requests : size.requests + half]
    random.Random(0).shuffle(mixed)
    _until("the gateway to serve it", lambda: client.ask(mixed[0])[1] == f"{MODEL}:{second}", 60)
    traffic.send(mixed)
    report["settled"] = _drift(second, "stable")

    _step(f"Rollback to {first} and promotion of {second} under load")
    report["switch"] = _switch_under_load(client, mixed, first, second)

    report["monitor"] = _tunesmith("monitor", f"{MODEL}:{second}")
    report["cost"] = _tunesmith("cost", f"{MODEL}:{second}")
    report["old_world"] = report["second"]["evaluation"]["slices"].get("source=train", {})
    report["new_world"] = report["second"]["evaluation"]["slices"].get("source=feedback", {})
    return report


def _write_files(folder: Path, size: Size) -> tuple[list[Pair], list[Pair], Path]:
    from pipelines.docstrings import packages, standard_library

    old, new = standard_library(), packages(*NEW_WORLD)
    random.Random(5).shuffle(old)
    random.Random(2).shuffle(new)
    learned = old[: size.train + size.test]
    lines = [json.dumps({"messages": [*_messages(p), {"role": "assistant", "content": p.summary}]}) for p in learned]
    (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    config = folder / "demo.yaml"
    config.write_text(
        f"""# tunesmith run -c {config.name}
model: {MODEL}
base: {{path: "{size.base}"}}
data:
  train: train.jsonl
  split: {{test: {size.test / (size.train + size.test):.3f}}}   # alike signatures stay in one split
  quality: {{dedup: near, max_tokens: 192}}
generation: {{max_tokens: 24, temperature: 0}}
tuning:
  method: lora
  {size.tuning}
  space:
    r: [8, 16]
    learning_rate: {{low: 2e-4, high: 2e-3, log: true}}
    lora_dropout: [0.0, 0.05]
    lr_scheduler_type: [linear, cosine]
    target_modules: [attention, all-linear]
    per_device_train_batch_size: {size.batch}
evaluation: {{suites: [quality], limit: {size.limit}}}
gates:
  - {{metric: loss, against: base, must: better}}
  - {{metric: loss, against: champion, must: not_worse, margin: 0.15, slice: "source=train"}}
  - {{metric: loss, against: champion, must: better, slice: "source=feedback"}}
promote: when_gates_pass
monitoring: {{keep_text: true, min_requests: 100}}
retrain: {{on: drift, min_rows: 150, cooldown: 10m, {size.retrain}}}
"""
    )
    return old[size.train + size.test :], new, config


def _messages(pair: Pair) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": pair.signature}]


class Client:
    """Asks as an application does; the key is a service key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.url = get_settings().need("gateway_url")
        self._http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=120, trust_env=False
        )

    def is_ready(self, pair: Pair) -> bool:
        """Whether the model answers yet: the first version of a base waits for its engine to start."""
        return self._post(pair).status_code == 200

    def _post(self, pair: Pair) -> httpx.Response:
        return self._http.post("/v1/chat/completions", json={"model": MODEL, "messages": _messages(pair)})

    def ask(self, pair: Pair) -> tuple[str, str]:
        """The request's id and the version that answered. Raises TunesmithError for anything but an answer."""
        answer = self._post(pair)
        if answer.status_code != 200:
            raise TunesmithError(f"The gateway answered {answer.status_code}: {answer.text[:200]}")
        version = answer.headers["x-tunesmith-version"]
        if answer.json()["model"] != version:
            raise TunesmithError(f"An answer of {answer.json()['model']} came with the header {version}.")
        return answer.headers["x-request-id"], version


class _Traffic:
    def __init__(self, client: Client) -> None:
        self.client = client

    def send(self, pairs: list[Pair]) -> list[tuple[str, Pair]]:
        """Ask all, eight at a time; returns each request's id with its pair."""
        begun = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(self.client.ask, pairs))
        err.print(f"{len(pairs)} requests in {time.monotonic() - begun:.0f} s, none failed")
        return [(request_id, pair) for (request_id, _), pair in zip(answers, pairs, strict=True)]


def _drift(version: int, expected: str) -> dict[str, Any]:
    """The verdict on a version, as soon as it is the expected one; the last one when it never is."""
    last: dict[str, Any] = {}

    def look() -> bool:
        last.update(_tunesmith("drift", f"{MODEL}:{version}"))
        return bool(last["verdict"] == expected)

    try:
        _until(f"the verdict `{expected}`", look, 45)
    except TunesmithError:
        raise TunesmithError(f"drift says {last['verdict']}, not {expected}: {last['explanation']}") from None
    err.print(f"drift on version {version}: [bold]{last['verdict']}[/]")
    return last


def _await_retrain(first: int) -> int:
    from infra.db import transaction
    from pipelines import runs

    said = ""

    def look() -> int | None:
        nonlocal said
        with transaction() as conn:
            run = conn.execute(runs.SQL["latest"], {"model": MODEL}).fetchone()
        if run is None or run["kind"] != "retrain":
            return None
        stages = ", ".join(run["stages"] or []) or "started"
        if stages != said:
            said = stages
            err.print(f"retrain: {stages}")
        if run["state"] in ("failed", "cancelled"):
            raise TunesmithError(f"The retrain run failed: {run['error']}")
        return int(run["version"]) if run["state"] == "completed" else None

    version = int(_until("the retrain flow", look, 1800))
    serving = [v["version"] for v in _tunesmith("versions", MODEL)["versions"] if v["serving"] == "champion"]
    if serving != [version] or version == first:
        reasons = "; ".join(_result(version)["gate"]["reasons"])
        raise TunesmithError(f"Version {version} was not promoted: {reasons}")
    return version


def _result(version: int) -> dict[str, Any]:
    from infra.db import transaction
    from pipelines import runs

    with transaction() as conn:
        row = conn.execute(runs.SQL["result"], {"model": MODEL, "version": version}).fetchone()
    if row is None:
        raise TunesmithError(f"No run made {MODEL}:{version}.")
    return dict(row["result"])


def _switch_under_load(client: Client, pairs: list[Pair], first: int, second: int) -> dict[str, Any]:
    """Roll back and promote again while requests run; how long each took from the command's start to the first
    answer of the version it put there."""
    stop = threading.Event()
    answers: list[tuple[float, str]] = []

    def ask(offset: int) -> None:
        for n in range(10_000):
            if stop.is_set():
                return
            _, version = client.ask(pairs[(offset + n * 4) % len(pairs)])
            answers.append((time.monotonic(), version))

    def until_served(version: int, since: float) -> float:
        def look() -> list[float]:
            return [at for at, by in list(answers) if by == f"{MODEL}:{version}" and at > since]

        return float(min(_until(f"an answer of version {version}", look, 60))) - since

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask, i) for i in range(4)]
        try:
            time.sleep(2)
            begun = time.monotonic()
            _tunesmith("rollback", MODEL, "--to", str(first), "--reason", "demo: rollback under load")
            back = until_served(first, begun)
            time.sleep(1)
            begun = time.monotonic()
            _tunesmith("promote", f"{MODEL}:{second}", "--reason", "demo: promote again under load")
            forth = until_served(second, begun)
            time.sleep(1)
        finally:
            stop.set()
        for future in asked:
            future.result()  # raises what failed
    return {"requests": len(answers), "failed": 0, "rollback_seconds": back, "promote_seconds": forth}


def _show(report: dict[str, Any], *, seconds: float) -> None:
    settings = get_settings()
    first, second = report["first"], report["second"]
    table = Table(title=f"{MODEL} after {seconds / 60:.1f} minutes", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    best = first["best"]
    searched = {k: v for k, v in best["params"].items() if k not in FIXED}
    params = ", ".join(f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in searched.items())
    table.add_row("tuned", f"{first['evaluation']['rows']} test rows; best of {best['trials']} trials: {params}")
    table.add_row(f"version {first['version']} over the base", _gain(first["evaluation"]["metrics"]["loss"]["vs_base"]))
    for name, world in (("old world", report["old_world"]), ("new world", report["new_world"])):
        if world:
            table.add_row(
                f"version {second['version']} over {first['version']}, {name}", _gain(world["loss"]["vs_champion"])
            )
    monitor = report["monitor"]
    table.add_row("latency", f"p50 {monitor['latency_ms']['p50']:.0f} ms, p95 {monitor['latency_ms']['p95']:.0f} ms")
    table.add_row("tokens per second", f"{monitor['tokens_per_second']:.0f}")
    table.add_row("cost per 1,000 requests", f"${report['cost']['usd_per_1000_requests']:.4f}")
    verdicts = [f"version {first['version']}: {report['quiet']['verdict']}, then {report['moved']['verdict']}"]
    verdicts.append(f"version {second['version']}: {report['settled']['verdict']}")
    table.add_row("drift", "; ".join(verdicts))
    switch = report["switch"]
    table.add_row(
        "rollback", f"{switch['rollback_seconds']:.2f} s from the command to its first answer, "
        f"back again {switch['promote_seconds']:.2f} s; {switch['requests']} requests meanwhile, none failed",
    )  # fmt: skip
    out.print(table)
    key = _tunesmith("keys", "create", "--role", "service", "--name", "curl")["key"]
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "shutil.copytree(src, dst)"}]})
    out.print(f"Console  {settings.need('gateway_url')}/", soft_wrap=True)
    out.print(f"MLflow   {settings.need('mlflow_url')}", soft_wrap=True)
    out.print(f"Prefect  {settings.need('prefect_url').removesuffix('/api')}", soft_wrap=True)
    out.print("A key for the console: `tunesmith keys create --role admin --name me`", soft_wrap=True)
    out.print(
        f"curl {settings.need('gateway_url')}/v1/chat/completions -H 'Authorization: Bearer {key}' "
        f"-H 'Content-Type: application/json' -d '{body}'",
        soft_wrap=True, markup=False,
    )  # fmt: skip


def _gain(difference: dict[str, Any]) -> str:
    """A difference of losses as a gain: what is lower is better."""
    low, high = sorted((-difference["low"], -difference["high"]))
    which = "lower" if difference["estimate"] <= 0 else "higher (the gate allows 0.15)"
    size = abs(difference["estimate"])
    return f"held-out loss {which} by {size:.3f}, gain [{low:+.3f}, {high:+.3f}], {difference['n']} rows"


def _step(text: str) -> None:
    err.rule(f"[bold]{text}", align="left")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *arguments]


def _tunesmith(*arguments: str, show: bool = False) -> dict[str, Any]:
    """One command with ``--json``. A refusal (3) is a result; other exit codes raise its sentence."""
    done = subprocess.run(
        _command(*arguments, "--json"), stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE, check=False
    )
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        shown = (done.stderr or b"").decode(errors="replace").strip()[-300:]
        raise TunesmithError(f"`tunesmith {' '.join(arguments)}` failed ({done.returncode}): {shown}") from None
    if "error" in result:
        raise TunesmithError(result["error"]["message"], hint=result["error"]["hint"])
    return result


def _until(what: str, look: Callable[[], Any], seconds: float) -> Any:
    """What `look` returns once it is true. Raises TunesmithError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.5)
    raise TunesmithError(f"Waited {seconds:.0f} s for {what}.", hint="See `tunesmith status`.")
