"""Migrations as two replicas, an older and a newer program meet them (fault 21)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from infra import migrate
from infra.errors import TunesmithError, UsageError
from infra.settings import Settings, own_settings

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
    migrate.check(empty.database())


def test_a_newer_schema_is_refused_by_this_program(database: Settings) -> None:
    with psycopg.connect(database.database(), autocommit=True) as conn:
        conn.execute("insert into schema_migration (number, name, digest) values (9999, '9999_later', 'x')")
    for refuse in (migrate.migrate, migrate.check):
        with pytest.raises(TunesmithError, match="schema 9999") as caught:
            refuse(database.database())
        assert "nstall" in caught.value.hint


def test_an_older_schema_is_refused_by_a_process_that_does_not_migrate(empty: Settings) -> None:
    migrate.create_databases(empty)
    with pytest.raises(TunesmithError, match="older than this program's") as caught:
        migrate.check(empty.database())
    assert "tunesmith up" in caught.value.hint


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
