"""Migrations as two replicas, an older and a newer program meet them (fault 21)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from infra import db, migrate, ports
from infra.errors import TunesmithError, UsageError
from infra.settings import Settings, own_settings
from tests.stacks import tunesmith

RACER = (
    "import sys; from infra import migrate; from infra.settings import own_settings\n"
    "settings = own_settings()\n"
    "sys.stdin.readline()\n"  # all start together
    "migrate.create_databases(settings)\n"
    "print(migrate.migrate(settings.database()))\n"
)


@pytest.fixture
def empty(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of a prefix whose databases do not exist yet."""
    prefix = database.database_prefix + "new_"
    monkeypatch.setenv("TUNESMITH_DATABASE_PREFIX", prefix)
    return own_settings()


@pytest.fixture(autouse=True)
def _drop(database: Settings) -> object:
    yield
    with psycopg.connect(database.server(), autocommit=True) as conn:
        for name in migrate.DATABASES:
            conn.execute(f'drop database if exists "{database.database_prefix}new_{name}" with (force)')


def test_of_many_processes_at_once_one_migrates(empty: Settings) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ.copy(),
        )
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    ended = [racer.communicate(timeout=300) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 6, ended
    assert sorted(int(out) for out, _ in ended) == [0] * 5 + [len(migrate.migrations())]
    with psycopg.connect(empty.database()) as conn:
        migrate.check(conn)


def test_a_newer_schema_is_refused_by_this_program(database: Settings) -> None:
    with psycopg.connect(database.database(), autocommit=True) as conn:
        conn.execute("insert into schema_migration (number, name, digest) values (9999, '9999_later', 'x')")
        with pytest.raises(TunesmithError, match="schema 9999") as caught:
            migrate.migrate(database.database())
    assert "nstall" in caught.value.hint


@pytest.mark.parametrize("command", ["models", "keys list", "serve", "watch", "worker --study s"])
@pytest.mark.parametrize("schema", ["newer", "older"])
def test_every_process_refuses_another_schema_in_a_sentence(empty: Settings, command: str, schema: str) -> None:
    migrate.create_databases(empty)
    if schema == "newer":
        migrate.migrate(empty.database())
        with psycopg.connect(empty.database(), autocommit=True) as conn:
            conn.execute("insert into schema_migration (number, name, digest) values (9999, '9999_later', 'x')")
    done = tunesmith(empty.home, *command.split(), timeout=60, TUNESMITH_PORT=str(ports.free()))
    assert done.returncode == 1, done.stderr
    assert f"{schema} than this program's {len(migrate.migrations())}" in done.stderr
    assert ("Install the release" if schema == "newer" else "tunesmith up") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_asks_for_the_schema_once(database: Settings) -> None:
    with db.transaction():
        pass
    with psycopg.connect(database.database(), autocommit=True) as conn:
        conn.execute("drop table schema_migration")
    with db.transaction() as found, db.connect() as other:  # would raise if it were looked at again
        assert found.execute("select 1").fetchone() == other.execute("select 1").fetchone()


def test_an_applied_migration_may_not_change(empty: Settings, tmp_path: Path) -> None:
    migrate.create_databases(empty)
    file = tmp_path / "0001_first.sql"
    file.write_text("create table a ()")
    assert migrate.migrate(empty.database(), tmp_path) == 1
    file.write_text("create table b ()")
    with pytest.raises(TunesmithError, match="0001_first was changed"):
        migrate.migrate(empty.database(), tmp_path)


def test_a_migration_that_fails_leaves_nothing(empty: Settings, tmp_path: Path) -> None:
    migrate.create_databases(empty)
    (tmp_path / "0001_first.sql").write_text("create table a ()")
    (tmp_path / "0002_second.sql").write_text("create table b (); select 1 / 0")
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate.migrate(empty.database(), tmp_path)
    with psycopg.connect(empty.database()) as conn:
        assert conn.execute("select to_regclass('a')::text, to_regclass('b')::text").fetchone() == ("a", None)
    (tmp_path / "0002_second.sql").write_text("create table b ()")
    assert migrate.migrate(empty.database(), tmp_path) == 1


def test_a_user_who_may_not_create_databases_gets_a_sentence(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(empty.server(), autocommit=True) as conn:
        conn.execute("drop role if exists plain")
        conn.execute("create role plain login password 'plain'")
    host = empty.server().rsplit("@", 1)[1]
    monkeypatch.setenv("TUNESMITH_DATABASE_URL", f"postgresql://plain:plain@{host}")
    with pytest.raises(UsageError, match="may not create the database"):
        migrate.create_databases(own_settings())
