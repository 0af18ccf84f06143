"""The gateway against LiteLLM's proxy and MLflow's gateway: peak rate and added latency before one model server.

    .venv/bin/python tests/benchmarks/gateway.py [--short] [--litellm PATH]

The model server answers at once (`gateway_peer.py`). Each gateway is one process: ours as `tunesmith serve`, with keys
and with each request recorded in PostgreSQL; LiteLLM with a master key and nothing else (PATH is its `litellm`, in an
environment of its own: `pip install 'litellm[proxy]==1.106.2'`); MLflow as `tunesmith up` starts it, on uvloop, with
usage tracking on, in the same PostgreSQL. The sides take turns. Peak: the best of a few numbers of connections, each
asking again as soon as it is answered. Added latency: the median at the same offered rate, less that of the model
server asked directly. That all was answered rightly, and all of ours was recorded, is checked. No time is asserted:
figures are printed, with the targets they have. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from _home import Home, started, temporary_home
from mlflow_gateway import VARIABLES, add_endpoint
from psycopg.types.json import Jsonb

from deploy.auth import create_key
from infra import ports, services, storage
from infra.db import transaction
from infra.settings import get_settings
from infra.web import answers
from registry import bundle, deployments, upstreams
from registry.bundle import BaseIdentity, Generation, Hosted, HostedModel, Manifest

PEER = Path(__file__).with_name("gateway_peer.py")
MESSAGES = [{"role": "user", "content": "My parcel has not arrived yet, though it was to come on Monday. Where is it?"}]
TARGETS = {"litellm": (10.0, 0.1), "mlflow": (20.0, None)}
DIGEST = "sha256:" + "b" * 64


@dataclass(frozen=True, kw_only=True)
class Size:
    rounds: int
    seconds: float
    connections: tuple[int, ...]


LONG = Size(rounds=5, seconds=8, connections=(8, 32, 96))
SHORT = Size(rounds=1, seconds=3, connections=(16,))


@dataclass(kw_only=True)
class Side:
    """A server under load. `process` is the gateway's; its CPU is told with its children's. `answered` counts all."""

    name: str
    url: str
    headers: Mapping[str, str]
    model: str
    process: psutil.Process
    peaks: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    answered: int = 0

    def load(self, seconds: float, connections: int, rate: float = 0.0) -> dict[str, Any]:
        asked = {"headers": dict(self.headers), "body": {"model": self.model, "messages": MESSAGES, "max_tokens": 16}}
        arguments = [sys.executable, str(PEER), "load", self.url, str(seconds), str(connections), str(rate)]
        before = self.cpu()
        done = subprocess.run(arguments, input=json.dumps(asked), capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        if found["failed"] or found["refused"]:
            sys.exit(f"{self.name} failed {found['failed']} beside {found['answered']} answers: {found['why']}")
        self.answered += found["answered"]
        found["cpu_ms"] = 1000 * (self.cpu() - before) / max(1, found["answered"])
        return found

    def cpu(self) -> float:
        total = 0.0
        for process in (self.process, *self.process.children(recursive=True)):
            times = process.cpu_times()
            total += times.user + times.system
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one round, fewer connections")
    parser.add_argument("--litellm", type=Path, help="the litellm command; without it that side is left out")
    options = parser.parse_args()
    size = SHORT if options.short else LONG
    with temporary_home() as home, ExitStack() as stack:
        model_url = stack.enter_context(model_server(home))
        direct = Side(
            name="direct", url=f"{model_url}/v1/chat/completions", headers={}, model="demo", process=psutil.Process()
        )
        sides = [stack.enter_context(ours(home, model_url))]
        if options.litellm is not None:
            sides.append(stack.enter_context(litellm(home, model_url, options.litellm)))
        else:
            print("LiteLLM is left out: name its command with --litellm.")
        sides.append(stack.enter_context(mlflow(home, model_url)))
        for side in sides:
            side.load(2, 8)  # caches, connections
        best = {side.name: best_connections(side, size) for side in sides}
        for turn in range(size.rounds):
            for side in sides:
                found = side.load(size.seconds, best[side.name])
                side.peaks.append(found["answered"] / found["seconds"])
                side.cpu_ms.append(found["cpu_ms"])
            print(f"peak, round {turn + 1}: " + ", ".join(f"{s.name} {s.peaks[-1]:.0f}/s" for s in sides), flush=True)
        slow = next((s for s in sides if s.name == "litellm"), sides[-1])
        rate = statistics.median(slow.peaks) / 2
        for turn in range(size.rounds):
            for side in (direct, *sides):
                offered = rate if side.name != "mlflow" else min(rate, statistics.median(side.peaks) / 2)
                found = side.load(size.seconds, 64, offered)
                times = sorted(found["milliseconds"])
                side.medians.append(statistics.median(times))
                side.p99s.append(times[int(0.99 * len(times))])
            print(
                f"latency, round {turn + 1}, p50 ms: "
                + ", ".join(f"{s.name} {s.medians[-1]:.2f}" for s in (direct, *sides)),
                flush=True,
            )
        until = time.monotonic() + 120
        while recorded() < sides[0].answered and time.monotonic() < until:
            time.sleep(0.5)
        print(f"check: {sides[0].answered} requests were answered by ours, {recorded()} are recorded")
        if recorded() != sides[0].answered:
            sys.exit("That must not be.")
    report(direct, sides, rate)


def report(direct: Side, sides: list[Side], rate: float) -> None:
    floor = statistics.median(direct.medians)
    print(f"\nasked directly: p50 {floor:.2f} ms; offered {rate:.0f} requests/s (MLflow: half of its own peak)")
    added, peaks = {}, {}
    for side in sides:
        added[side.name] = statistics.median(m - d for m, d in zip(side.medians, direct.medians, strict=True))
        peaks[side.name] = statistics.median(side.peaks)
        print(
            f"{side.name}: peak {peaks[side.name]:.0f}/s, {statistics.median(side.cpu_ms):.2f} CPU ms a request; "
            f"added p50 {added[side.name]:.2f} ms, p99 {statistics.median(side.p99s):.2f} ms"
        )
    for name, (rates, share) in TARGETS.items():
        if name not in peaks:
            continue
        print(f"ours / {name}: peak rate {peaks['ours'] / peaks[name]:.1f} (target {rates:g})", end="")
        print(f", added p50 {added['ours'] / added[name]:.3f} (target {share:g})" if share else "")


def best_connections(side: Side, size: Size) -> int:
    """With how many connections a side answers most."""
    rates = {n: (found := side.load(size.seconds / 2, n))["answered"] / found["seconds"] for n in size.connections}
    best = max(rates, key=lambda n: rates[n])
    print(f"{side.name}: best with {best} connections (" + ", ".join(f"{n}: {r:.0f}/s" for n, r in rates.items()) + ")")
    return best


def recorded() -> int:
    with transaction() as conn:
        row = conn.execute("select count(*) as n from request_event where status = 200").fetchone()
    assert row is not None
    return int(row["n"])


# ---------------------------------------------------------------- servers


@contextmanager
def model_server(home: Home) -> Iterator[str]:
    port = ports.free()
    log = home.folder / "model.log"

    def start() -> subprocess.Popen[bytes]:
        return _child([sys.executable, str(PEER), "serve", str(port)], log)

    with started(start, lambda: not ports.is_free(port), "The model server", log):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def ours(home: Home, model_url: str) -> Iterator[Side]:
    """`tunesmith serve`, and a hosted version at the model server."""
    manifest = Manifest(
        model="demo",
        method="hosted",
        base=BaseIdentity(
            id="none", revision="main", digest=DIGEST, tokenizer_digest=DIGEST, template_digest=DIGEST, dtype="float32"
        ),
        generation=Generation(max_tokens=16),
        hosted=Hosted(models=(HostedModel(upstream="model", model="demo"),)),
        code_version="benchmark",
    )
    with storage.scratch("bundle") as folder:
        (folder / bundle.ENVIRONMENT).write_text("{}")
        digest = bundle.write(folder, manifest)
        storage.keep("bundle", digest, folder)
    with transaction() as conn:
        key = create_key(conn, name="bench", role="service").key
        upstreams.put(conn, "model", f"{model_url}/v1", actor="benchmark")
        conn.execute(
            "insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)"
            " values (%s, 'none', 'main', 't', 'c', 1, 'float32')",
            (DIGEST,),
        )
        conn.execute("insert into model (name) values ('demo')")
        conn.execute(
            "insert into version (model, number, bundle_digest, base_digest, method, manifest, profile)"
            " values ('demo', 1, %s, %s, 'hosted', %s, '{}')",
            (digest, DIGEST, Jsonb(bundle.read(storage.get("bundle", digest)).model_dump(mode="json"))),
        )
        deployments.promote(conn, "demo", 1, actor="benchmark", reason="benchmark", force=True)
    port = ports.free()
    log = home.folder / "ours.log"
    command = [sys.executable, "-m", "pipelines.cli", "serve"]
    with started(
        lambda: _child(command, log, TUNESMITH_PORT=str(port)), lambda: answers(f"http://127.0.0.1:{port}/readyz"),
        "The gateway", log,
    ) as process:  # fmt: skip
        yield Side(
            name="ours", url=f"http://127.0.0.1:{port}/v1/chat/completions", model="demo",
            headers={"authorization": f"Bearer {key}"}, process=psutil.Process(process.pid),
        )  # fmt: skip


@contextmanager
def litellm(home: Home, model_url: str, command: Path) -> Iterator[Side]:
    """Its proxy with one worker, a key, no database, no callbacks."""
    port = ports.free()
    config, log = home.folder / "litellm.yaml", home.folder / "litellm.log"
    named = {"model": "openai/demo", "api_base": f"{model_url}/v1", "api_key": "none"}
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": "demo", "litellm_params": named}],
                "general_settings": {"master_key": "sk-benchmark"},
                "litellm_settings": {"telemetry": False, "set_verbose": False},
            }
        )
    )
    arguments = [
        str(command),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--num_workers",
        "1",
    ]
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with started(
        lambda: _child(arguments, log, **quiet), lambda: answers(f"http://127.0.0.1:{port}/health/liveliness"),
        "LiteLLM", log,
    ) as process:  # fmt: skip
        yield Side(
            name="litellm", url=f"http://127.0.0.1:{port}/v1/chat/completions", model="demo",
            headers={"authorization": "Bearer sk-benchmark"}, process=psutil.Process(process.pid),
        )  # fmt: skip


@contextmanager
def mlflow(home: Home, model_url: str) -> Iterator[Side]:
    port = ports.free()
    log = home.folder / "mlflow.log"
    service = services.mlflow(get_settings(), port, os.environ | VARIABLES | {"OMP_NUM_THREADS": "1"})

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return service.start(file)

    with started(start, service.ready, "MLflow", log) as process:
        url = add_endpoint(f"http://127.0.0.1:{port}", "demo", f"{model_url}/v1", "none")
        yield Side(
            name="mlflow", url=f"{url}/chat/completions", model="demo", headers={},
            process=psutil.Process(process.pid),
        )  # fmt: skip


def _child(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    file: IO[bytes]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1", **environment}, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
