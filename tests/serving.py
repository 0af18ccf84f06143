"""What tests of serving stand on: versions that are really sealed, an engine, a gateway process, keys."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_peer
import httpx
import numpy as np
from psycopg.types.json import Jsonb
from safetensors.numpy import save_file

from deploy.auth import create_key
from infra import ports, storage
from infra.db import transaction
from registry import bundle, datasets, deployments
from registry.bundle import BaseIdentity, Generation, Hosted, Manifest, Prompt
from registry.datasets import Dataset
from registry.evidence import keep_evidence

BASE = "sha256:" + "b" * 64
GATEWAY = """
import sys
from infra import log
from infra.settings import get_settings
from deploy import clients
from deploy.gateway import create_app, serve
from deploy.inference import Limits
from monitoring.console.app import console_routes
from monitoring.routes import routes
log.setup()
settings = get_settings()
given = eval(sys.argv[1])
clients.HEAD_SECONDS, clients.TAKE_SECONDS = given.pop("client_seconds", (30.0, 60.0))
limits = Limits(**given)
serve(create_app(settings, routes=[*routes(), *console_routes()], limits=limits), settings)
"""


def wait_for(true: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """What `true` returns as soon as that is something; an assertion when it takes far too long."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain {what}"
        time.sleep(0.02)
    return value


def add_base(digest: str = BASE) -> None:
    with transaction() as conn:
        conn.execute(
            "insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)"
            " values (%s, 'test', 'main', 'sha256:t', 'sha256:c', 1, 'float32') on conflict do nothing",
            (digest,),
        )


def add_version(
    model: str,
    number: int,
    *,
    base: str = BASE,
    adapter: Path | None = None,
    system: str | None = None,
    settings: dict[str, Any] | None = None,
    hosted: Hosted | None = None,
    dataset: Dataset | None = None,
    evaluation: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """A registered version, with a real adapter or one of random numbers, or none where hosted models answer; made by
    a run of that `config`, if any."""
    add_base(base)
    with storage.scratch("bundle") as folder:
        (folder / "adapter").mkdir()
        if hosted is not None:
            (folder / bundle.ENVIRONMENT).write_text("{}")
        elif adapter is not None:
            for name in (bundle.ADAPTER_CONFIG, bundle.ADAPTER_WEIGHTS):
                shutil.copy(adapter / Path(name).name, folder / name)
        else:
            (folder / bundle.ADAPTER_CONFIG).write_text(json.dumps({"r": 4, "peft_type": "LORA"}))
            values = np.random.default_rng(number).normal(size=(4, 8)).astype(np.float32)
            save_file({"w.lora_A.weight": values}, folder / bundle.ADAPTER_WEIGHTS)
        manifest = Manifest(
            model=model,
            method="lora",
            base=BaseIdentity(
                id="test", revision="main", digest=base, tokenizer_digest=BASE, template_digest=BASE, dtype="float32"
            ),
            prompt=Prompt(system=system),
            generation=Generation(max_tokens=17, temperature=0.25),
            params={"seed": number},
            hosted=hosted,
            code_version="test",
        )
        digest = bundle.write(folder, manifest)
        storage.keep("bundle", digest, folder)
    with transaction() as conn:
        conn.execute(
            "insert into model (name, settings) values (%s, %s)"
            " on conflict (name) do update set settings = excluded.settings",
            (model, Jsonb(settings or {})),
        )
        if dataset is not None:
            datasets.record(conn, model, dataset)
        if config is not None:
            conn.execute(
                "insert into run (id, model, kind, state, fingerprint, config, config_path, token)"
                " values (%s, %s, 'train', 'completed', 'f', %s, 'm.yaml', 1)",
                (run := uuid.uuid4(), model, Jsonb(config)),
            )
        conn.execute(
            "insert into version"
            " (model, number, bundle_digest, base_digest, method, manifest, profile, dataset_digest, evaluation,"
            " run_id) values (%s, %s, %s, %s, 'lora', %s, '{}', %s, %s, %s)",
            (
                model,
                number,
                digest,
                base,
                Jsonb(bundle.read(storage.get("bundle", digest)).model_dump(mode="json")),
                dataset.digest if dataset is not None else None,
                keep_evidence(conn, "evaluation", evaluation) if evaluation is not None else None,
                run if config is not None else None,
            ),
        )


def promote(model: str, number: int) -> None:
    """Past its gate."""
    with transaction() as conn:
        deployments.promote(conn, model, number, actor="test", reason="test", force=True)


def add_engine(url: str, base: str = BASE) -> None:
    """A row that stays fresh for as long as a test lasts."""
    with transaction() as conn:
        conn.execute(
            "insert into engine (id, base_digest, url, seen_at) values (%s, %s, %s, now() + interval '1 hour')",
            (uuid.uuid4(), base, url),
        )


@contextmanager
def child(*arguments: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | environment, stdout=file, stderr=file, cwd=log.parent
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(kw_only=True)
class Stand:
    """A gateway with everything around it."""

    home: Path
    url: str
    engine_url: str
    keys: dict[str, str]
    engine: subprocess.Popen[bytes] | None = None
    gateway: subprocess.Popen[bytes] | None = None
    http: httpx.Client

    def header(self, role: str = "service") -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[role]}"}

    def ask(self, model: str = "demo", text: str = "hello", role: str = "service", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.http.post(f"{self.url}/v1/chat/completions", json=body, headers=self.header(role))

    def stats(self) -> Any:
        return self.http.get(
            f"{self.engine_url}/stats", headers={"authorization": f"Bearer {engine_peer.SECRET}"}
        ).json()

    def wait_ready(self) -> None:
        wait_for(lambda: self._status() == 200, what=f"for the gateway, see {self.home}/gateway.log")

    def _status(self) -> int:
        try:
            return self.http.get(f"{self.url}/readyz").status_code
        except httpx.TransportError:
            return 0

    def events(self) -> list[dict[str, Any]]:
        """All events that arrived, in the order of their requests."""
        with transaction() as conn:
            return conn.execute("select * from request_event order by at, id").fetchall()

    def wait_events(self, count: int, seconds: float = 60.0) -> list[dict[str, Any]]:
        wait_for(lambda: len(self.events()) >= count, seconds, f"for {count} events")
        return self.events()

    @contextmanager
    def running_engine(self) -> Iterator[None]:
        port = self.engine_url.rsplit(":", 1)[1]
        with child(engine_peer.__file__, port, log=self.home / "engine.log") as self.engine:
            wait_for(lambda: not ports.is_free(int(port)), what="for the engine")
            yield

    @contextmanager
    def running_gateway(self, *, secret: str = engine_peer.SECRET, **limits: Any) -> Iterator[None]:
        port = self.url.rsplit(":", 1)[1]
        environment = {"TUNESMITH_PORT": port, "TUNESMITH_ENGINE_SECRET": secret}
        with child("-c", GATEWAY, repr(limits), log=self.home / "gateway.log", **environment) as self.gateway:
            yield


@contextmanager
def make_stand(home: Path) -> Iterator[Stand]:
    """Keys of every role, a base, an engine's row; nothing runs yet."""
    engine_port = ports.free()
    gateway_port = ports.free(but=[engine_port])
    keys = {}
    with transaction() as conn:
        for role in ("viewer", "service", "operator", "admin"):
            keys[role] = create_key(conn, name=f"the {role}", role=role).key
    add_base()
    add_engine(f"http://127.0.0.1:{engine_port}")
    with httpx.Client(trust_env=False, timeout=60) as http:
        yield Stand(
            home=home,
            url=f"http://127.0.0.1:{gateway_port}",
            engine_url=f"http://127.0.0.1:{engine_port}",
            keys=keys,
            http=http,
        )


@contextmanager
def three_versions(home: Path) -> Iterator[Stand]:
    """Model ``demo`` with versions 1 to 3, of which 1 serves."""
    for number in (1, 2, 3):
        add_version("demo", number, system=f"You are version {number}.")
    promote("demo", 1)
    with make_stand(home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()
        yield stand
