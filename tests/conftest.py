"""What tests stand on: a real PostgreSQL, a migrated database of their own, a home of their own."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONSAFEPATH"] = "1"

import hypothesis
import psycopg
import pytest
from psycopg import sql

from infra import db, migrate, postgres, settings, storage
from registry import bases
from registry.bases import Base
from tests.stacks import Stack, new_folder, tunesmith

# The same examples in every run, however slow the machine: what fails here can be seen again.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("steady")

FOREIGN = ("TUNESMITH_", "MLFLOW_", "PREFECT_", "OTEL_", "PG")


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> None:
    """No setting of the caller's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ["DO_NOT_TRACK"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@dataclass(frozen=True, kw_only=True)
class Server:
    """The session's PostgreSQL and its migrated template database."""

    url: str
    template: str

    def admin(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.url, autocommit=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """An embedded PostgreSQL for the whole session, without fsync: its data is thrown away."""
    home = new_folder()
    try:
        with postgres.running(home, options={"fsync": "off", "synchronous_commit": "off"}) as (cluster, port):
            with psycopg.connect(cluster.url(port), autocommit=True) as conn:
                conn.execute("create database template_tunesmith")
            migrate.migrate(cluster.url(port, "template_tunesmith"))
            yield Server(url=cluster.url(port), template="template_tunesmith")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def forget() -> None:
    """Have settings and connections made anew, as a new process would."""
    if db.pool.cache_info().currsize:
        db.pool().close()
    db.pool.cache_clear()
    settings.get_settings.cache_clear()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty ``TUNESMITH_HOME`` of the test's own."""
    folder = new_folder()
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))
    forget()
    yield folder
    forget()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[settings.Settings]:
    """A migrated ``tunesmith`` database and an empty ``optuna`` one of the test's own, as the settings say; child
    processes of the test find them too, through the environment. Gives the settings."""
    prefix = f"t{uuid.uuid4().hex[:12]}_"
    with server.admin() as conn:
        for name, template in (("tunesmith", server.template), ("optuna", "template1")):
            conn.execute(
                sql.SQL("create database {} template {}").format(
                    sql.Identifier(prefix + name), sql.Identifier(template)
                )
            )
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", server.url)
    monkeypatch.setenv("TUNESMITH_DATABASE_PREFIX", prefix)
    forget()
    yield settings.get_settings()
    forget()
    with server.admin() as conn:
        for name in ("tunesmith", "optuna"):
            conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(prefix + name)))


@pytest.fixture(scope="session")
def tiny_made(server: Server) -> Iterator[Base]:
    """builtin:tiny, made once for the session, in a home and a database of its own."""
    folder = new_folder()
    with server.admin() as conn:
        conn.execute("create database tiny_tunesmith template template_tunesmith")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder))
        patch.setenv("TUNESMITH_DATABASE_URL", server.url)
        patch.setenv("TUNESMITH_DATABASE_PREFIX", "tiny_")
        forget()
        base = bases.resolve("builtin:tiny")
        forget()
    yield base
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tiny_base(database: settings.Settings, tiny_made: Base) -> Base:
    """builtin:tiny as the test's own home and database have it. Its files are the session's: do not write to them."""
    return give_base(tiny_made)


def give_base(made: Base) -> Base:
    """Let the home and the database that hold now have a base that was made elsewhere."""
    place = storage.where("base", made.digest)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(made.folder, target_is_directory=True)
    with db.transaction() as conn:
        conn.execute(bases.SQL["insert"], asdict(made) | {"folder": None})
    return bases.load(made.digest)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One `tunesmith up --detach` for the whole session, on a home of its own and whatever ports are free."""
    home = new_folder()
    try:
        up = tunesmith(home, "up", "--detach", "--json")
        assert up.returncode == 0, up.stderr + up.stdout
        urls = {service["name"]: service["url"] for service in json.loads(up.stdout)["services"]}
        yield Stack(
            home=home,
            key=json.loads(up.stdout)["key"]["key"],
            gateway_url=urls["gateway"],
            mlflow_url=urls["mlflow"],
            prefect_url=urls["prefect"] + "/api",
        )
    finally:
        tunesmith(home, "down")
        shutil.rmtree(home, ignore_errors=True)
