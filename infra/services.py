"""The processes of a local stack: how each is started, what it needs first, and how one sees that it is ready."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import SecretStr

from infra import ports, processes, web
from infra.errors import TunesmithError, UsageError
from infra.postgres import Cluster
from infra.prefect import call as ask_prefect
from infra.settings import Settings

PREFERRED = {"mlflow": 5000, "prefect": 4200, "gateway": 8080}


@dataclass(frozen=True, kw_only=True)
class Service:
    """`tier` is the order of stopping, low first; a service is ready when it has lived for `settle` seconds and
    `ready` says so."""

    name: str
    start: Callable[[IO[Any]], subprocess.Popen[bytes]]
    ready: Callable[[], bool]
    needs: tuple[str, ...] = ()
    url: str | None = None
    health: str | None = None
    settle: float = 0
    tier: int = 1
    stop_signal: int = signal.SIGTERM
    patience: float = 15  # seconds between asking it to end and killing it


def choose_ports(own: Settings, before: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """A port for each server that we start, the ones of last time if they are free, and a sentence for each that
    is not the usual one.

    Raises UsageError when the gateway's port was asked for and is taken.
    """
    chosen: dict[str, int] = {}
    notes: list[str] = []
    if "port" in own.model_fields_set:
        if not ports.is_free(own.port, own.host):
            raise UsageError(
                f"Port {own.port} on {own.host} is taken.",
                hint="Stop what listens there, or set TUNESMITH_PORT to another port.",
            )
        chosen["gateway"] = own.port
    for name, external in (
        ("postgres", own.database_url is not None),
        ("gateway", "gateway" in chosen),
        ("mlflow", own.mlflow_url is not None),
        ("prefect", own.prefect_url is not None),
    ):
        if external:
            continue
        usual = PREFERRED.get(name)
        port = ports.free(first=usual, but=chosen.values())
        if port != usual:
            port = ports.free(first=before.get(name), but=chosen.values())
            if usual is not None:
                notes.append(f"Port {usual} is taken: {name} listens on {port}.")
        chosen[name] = port
    return chosen, notes


def resolve(own: Settings, chosen: Mapping[str, int], cluster: Cluster | None) -> Settings:
    """The settings of the stack: what was set, completed by what we start."""
    host = "127.0.0.1" if own.host in ("0.0.0.0", "::", "") else own.host  # noqa: S104 - compared, not bound
    port = chosen["gateway"]
    update: dict[str, Any] = {
        "port": port,
        "gateway_url": f"http://{f'[{host}]' if ':' in host else host}:{port}",
        "engine_secret": own.engine_secret or SecretStr(secrets.token_urlsafe(24)),
    }
    if cluster is not None:
        update["database_url"] = SecretStr(cluster.url(chosen["postgres"], "tunesmith"))
    if "mlflow" in chosen:
        update["mlflow_url"] = f"http://127.0.0.1:{chosen['mlflow']}"
    if "prefect" in chosen:
        update["prefect_url"] = f"http://127.0.0.1:{chosen['prefect']}/api"
    return own.model_copy(update=update)


def environment(settings: Settings, mark: str) -> dict[str, str]:
    """What every child gets: all settings of the stack, one thread, no telemetry, no proxy for loopback.

    OpenTelemetry's variables are the watcher's alone: Prefect and MLflow heed them too, and would tell a collector
    things that nobody asked for.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TUNESMITH_", "OTEL_"))}
    for name in Settings.model_fields.keys() - {"url", "api_key"}:  # a person's, for commands
        value = getattr(settings, name)
        if value is not None:
            env[f"TUNESMITH_{name.upper()}"] = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
    loopback = "127.0.0.1,localhost,::1"
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), loopback]))
    return env | {
        processes.MARK: mark,
        "MLFLOW_TRACKING_URI": settings.need("mlflow_url"),
        "PREFECT_API_URL": settings.need("prefect_url"),
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def fixed(settings: Settings, chosen: Mapping[str, int], cluster: Cluster | None, mark: str) -> list[Service]:
    """All services but the engines, in the order of starting."""
    env = environment(settings, mark)
    found = []
    if cluster is not None:
        found.append(postgres(cluster, chosen["postgres"]))
    if "mlflow" in chosen:
        found.append(mlflow(settings, chosen["mlflow"], env))
    if "prefect" in chosen:
        found.append(prefect(settings, chosen["prefect"], env))
    found += [gateway(settings, env), watcher(env), worker(settings, env, local="prefect" in chosen)]
    return found


def postgres(cluster: Cluster, port: int) -> Service:
    return Service(
        name="postgres",
        start=lambda output: cluster.start(port, output=output),
        ready=partial(cluster.ready, port),
        url=f"postgresql://127.0.0.1:{port}",
        tier=9,
        stop_signal=signal.SIGINT,  # fast; SIGTERM would wait for its clients
        patience=30,
    )


def mlflow(settings: Settings, port: int, env: Mapping[str, str]) -> Service:
    # What `mlflow server` would do for one worker, without that command's own process, which costs another 0.2 GB
    # and the time of a second import, and whose uvicorn outlives it when it is killed. One worker: more of them
    # lose TCP_NODELAY on the asyncio loop. The variables are those of mlflow.server.constants; the range of
    # pyproject.toml keeps other releases out. The store's address holds a password: never an argument.
    own = {
        "_MLFLOW_SERVER_FILE_STORE": sqlalchemy_url(settings.database("mlflow"), "psycopg"),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(settings.home / "mlflow-artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SGI_NAME": "uvicorn",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "5",
    }
    clean = {name: value for name, value in env.items() if name != "MLFLOW_TRACKING_URI"}
    url = f"http://127.0.0.1:{port}"
    return _http(
        "mlflow",
        [
            *(sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        clean | own,
        settings.home,
        url=url,
        health=f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0",  # its tables are made by the first request
        needs=("postgres",),
        tier=3,
    )


def prefect(settings: Settings, port: int, env: Mapping[str, str]) -> Service:
    url = f"http://127.0.0.1:{port}"
    own = {
        "PREFECT_API_DATABASE_CONNECTION_URL": sqlalchemy_url(settings.database("prefect"), "asyncpg"),
        # In memory, the default, a restart of the server would crash healthy runs.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(settings.home / "prefect" / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return _http(
        "prefect", argv, {**env, **own}, settings.home, url=url, health=f"{url}/api/health", needs=("postgres",), tier=3
    )


def worker(settings: Settings, env: Mapping[str, str], *, local: bool) -> Service:
    name = f"{socket.gethostname()}-{settings.port}"
    # Prefect's runner takes <temp>/runner_storage for its own: whoever came second could not write there.
    scratch = settings.home / "prefect" / "tmp"
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = {"PREFECT_WORKER_QUERY_SECONDS": "1", "TMPDIR": str(scratch)}
    argv = [
        *(sys.executable, "-m", "prefect", "worker", "start"),
        *("--pool", settings.work_pool, "--type", "process"),
        *("--name", name),
    ]
    return Service(
        name="runner",
        start=partial(_spawn, argv, {**env, **own}, settings.home),
        # A server of the team's may want credentials for the question.
        ready=partial(_is_online, settings, name) if local else lambda: True,
        settle=2,
        needs=("prefect",),
        tier=1,
    )


def _is_online(settings: Settings, worker: str) -> bool:
    """Whether Prefect has heard from a worker of the pool (which the worker makes) lately."""
    online, path = {"workers": {"status": {"any_": ["ONLINE"]}}}, f"/work_pools/{settings.work_pool}/workers/filter"
    try:
        found = ask_prefect("POST", path, online, settings=settings, seconds=2)
    except TunesmithError:
        return False
    return any(each["name"] == worker for each in found)


def gateway(settings: Settings, env: Mapping[str, str]) -> Service:
    url = settings.need("gateway_url")
    return _http(
        "gateway",
        [*TUNESMITH, "serve"],
        env,
        settings.home,
        url=url,
        health=f"{url}/healthz",
        needs=("postgres",),
        tier=0,
    )


def watcher(env: Mapping[str, str]) -> Service:
    home = Path(env["TUNESMITH_HOME"])
    collector = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    return Service(
        name="watcher",
        start=partial(_spawn, [*TUNESMITH, "watch"], {**env, **collector}, home),
        ready=lambda: True,
        settle=2,
        needs=("postgres", "mlflow", "gateway"),
        tier=1,
    )


def engine(settings: Settings, base: str, port: int, mark: str) -> Service:
    """The engine for one base; `base` is its digest."""
    url = f"http://127.0.0.1:{port}"
    argv = [*TUNESMITH, "engine", "--base", base, "--port", str(port)]
    env = environment(settings, mark)
    name = engine_name(base)
    return _http(name, argv, env, settings.home, url=url, health=f"{url}/health", needs=("postgres",), tier=1)


def engine_name(base: str) -> str:
    return f"engine-{base.removeprefix('sha256:')[:8]}"


def sqlalchemy_url(url: str, driver: str) -> str:
    """A libpq URL as SQLAlchemy wants it; asyncpg calls libpq's ``sslmode`` ``ssl``."""
    parts = urlsplit(url)
    query = [(("ssl" if driver == "asyncpg" and k == "sslmode" else k), v) for k, v in parse_qsl(parts.query)]
    return urlunsplit(parts._replace(scheme=f"postgresql+{driver}", query=urlencode(query)))


TUNESMITH = (sys.executable, "-m", "pipelines.cli")  # our own command, wherever pip put its script


def _http(
    name: str,
    argv: list[str],
    env: Mapping[str, str],
    cwd: Path,
    *,
    url: str,
    health: str,
    needs: tuple[str, ...],
    tier: int,
) -> Service:
    return Service(
        name=name,
        start=partial(_spawn, argv, env, cwd),
        ready=partial(web.answers, health),
        needs=needs,
        url=url,
        health=health,
        tier=tier,
    )


def _spawn(argv: list[str], env: Mapping[str, str], cwd: Path, output: IO[Any]) -> subprocess.Popen[bytes]:
    return processes.spawn(argv, env=env, cwd=cwd, output=output)
