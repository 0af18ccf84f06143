"""Numbered plain SQL, applied once, in order, by one process at a time."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import scalar_row

from infra.errors import TunesmithError, Unreachable, UsageError
from infra.settings import Settings

DATABASES = ("tunesmith", "mlflow", "optuna", "prefect")
_FOLDER = Path(__file__).with_name("migrations")
_LOCK = 0x74756E65  # 'tune', the advisory lock's key


@dataclass(frozen=True, kw_only=True)
class Migration:
    number: int
    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def migrations(folder: Path = _FOLDER) -> list[Migration]:
    """All migrations, by number; their names are ``0001_what.sql`` without a gap."""
    found = [
        Migration(number=int(path.name[:4]), name=path.stem, text=path.read_text())
        for path in sorted(folder.glob("*.sql"))
        if re.match(r"\d{4}_", path.name)
    ]
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise TunesmithError(f"The migrations in {folder} are not numbered without a gap.")
    return found


def create_databases(settings: Settings) -> None:
    """Create those of the four databases that the server lacks.

    Raises Unreachable when the server does not answer, UsageError when it is older than PostgreSQL 15 or the
    user may not create databases.
    """
    try:
        with psycopg.connect(settings.server(), autocommit=True, connect_timeout=5) as conn:
            if conn.info.server_version < 150000:
                raise UsageError(
                    f"PostgreSQL {conn.info.server_version // 10000} is too old.",
                    hint="Tunesmith needs PostgreSQL 15 to 18.",
                )
            there = {row[0] for row in conn.execute("select datname from pg_database")}
            for name in (settings.database_prefix + name for name in DATABASES):
                if name not in there:
                    try:
                        conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
                    except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                        pass  # another process was first
                    except psycopg.errors.InsufficientPrivilege as error:
                        raise UsageError(
                            f"The database user may not create the database {name}.",
                            hint=f"Create it by hand, or grant CREATEDB. Needed: {', '.join(DATABASES)}.",
                        ) from error
    except psycopg.OperationalError as error:
        raise unreachable(error) from error


def migrate(url: str, folder: Path = _FOLDER) -> int:
    """Bring the database at `url` to this program's schema; returns how many migrations were applied.

    Safe to call from many processes at once: an advisory lock lets one work while the others wait, and each
    migration commits with its row. Raises TunesmithError when the database was made by a newer program, or when
    an applied migration's text has changed since.
    """
    try:
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as conn:
            conn.execute("select pg_advisory_lock(%s)", (_LOCK,))
            conn.execute(
                "create table if not exists schema_migration (number int primary key, name text not null,"
                " digest text not null, applied_at timestamptz not null default now())"
            )
            applied: dict[int, str] = dict(conn.execute("select number, digest from schema_migration").fetchall())
            ours = migrations(folder)
            if applied and max(applied) > len(ours):
                raise TunesmithError(
                    f"The database has schema {max(applied)}, made by a newer Tunesmith; this one knows {len(ours)}.",
                    hint="Install the newer release, or use another database.",
                )
            for migration in ours:
                if migration.number in applied:
                    if applied[migration.number] != migration.digest:
                        raise TunesmithError(
                            f"Migration {migration.name} was changed after it was applied.",
                            hint="Restore its text; changes go into a new migration.",
                        )
                    continue
                with conn.transaction():
                    conn.execute(migration.text)
                    conn.execute(
                        "insert into schema_migration (number, name, digest) values (%s, %s, %s)",
                        (migration.number, migration.name, migration.digest),
                    )
            return len(ours) - len(applied)
    except psycopg.OperationalError as error:
        raise unreachable(error) from error


def unreachable(error: Exception) -> Unreachable:
    """What a failed connection or statement says, as one sentence."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    # A name with several addresses: the last try says as much as each
    tried = [line for line in lines if line.startswith("- host: ")]
    cause = (tried or lines[:1])[-1].removeprefix("- ")
    _, refused, why = cause.partition("FATAL: ")
    told = f"PostgreSQL refused the connection: {why.strip()}" if refused else f"PostgreSQL does not answer: {cause}"
    return Unreachable(
        told.rstrip(".") + ".", hint="Check TUNESMITH_DATABASE_URL where you set it; else see `tunesmith status`."
    )


def check(conn: psycopg.Connection[Any]) -> None:
    """Raise TunesmithError unless the database has exactly this program's schema. Leaves no transaction open."""
    known = len(migrations())
    try:
        with conn.transaction(), conn.cursor(row_factory=scalar_row) as cursor:
            has = cursor.execute("select coalesce(max(number), 0) from schema_migration").fetchone() or 0
    except psycopg.errors.UndefinedTable:
        has = 0
    if has != known:
        age = "newer" if has > known else "older"
        raise TunesmithError(
            f"The database has schema {has}, {age} than this program's {known}.",
            hint="Install the release that made it." if has > known else "Run `tunesmith up`.",
        )
