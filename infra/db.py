"""PostgreSQL through psycopg 3: connections, a pool, named queries.

All database code is synchronous; async callers use ``asyncio.to_thread``. A function that writes takes the
connection as its first argument and never commits: transactions open at the edge (a command, a request, a
loop's turn) with ``with transaction() as conn:``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString, cast

import orjson
import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import set_json_loads

from infra import migrate
from infra.errors import Unreachable
from infra.settings import get_settings

if TYPE_CHECKING:
    from psycopg_pool import ConnectionPool

Connection = psycopg.Connection[DictRow]
# Where a process logs nothing, as most commands, the pool's lines would go to the terminal, beside the error
logging.getLogger("psycopg").addHandler(logging.NullHandler())
set_json_loads(orjson.loads)  # lists of thousands of rows are mostly JSON
# A server that is gone without a word, as a machine that lost its power, is noticed in seconds, and not when the kernel
# gives up after a quarter of an hour
_PATIENCE: Mapping[str, Any] = {
    "connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}  # fmt: skip
_checked: set[str] = set()  # databases whose schema this process found to be its own


@lru_cache(maxsize=1)
def pool() -> ConnectionPool[Connection]:
    """This process's connections to the ``tunesmith`` database, opened at first use, at most eight."""
    from psycopg_pool import ConnectionPool

    made: ConnectionPool[Connection] = ConnectionPool(
        get_settings().database(),
        min_size=0,
        max_size=8,
        open=True,
        timeout=10,
        reconnect_timeout=30,
        check=ConnectionPool.check_connection,
        connection_class=psycopg.Connection[DictRow],
        kwargs={"row_factory": dict_row, "application_name": "tunesmith", **_PATIENCE},
    )
    return made


@contextmanager
def transaction() -> Iterator[Connection]:
    """One transaction: commits at the end, rolls back when the block raises.

    Raises Unreachable when the database does not answer, TunesmithError when its schema is another program's.
    """
    try:
        if get_settings().database() in _checked:
            with pool().connection() as conn:
                yield conn
        else:  # fails at once and knows why, while a pool tries for ten seconds; and a command needs no other one
            with connect() as conn:
                yield conn
    except psycopg.OperationalError as error:  # also the pool's PoolTimeout
        raise migrate.unreachable(error) from error


def connect(*, autocommit: bool = False) -> Connection:
    """A connection of one's own, for LISTEN, advisory locks and long-lived loops; the caller closes it.

    Raises as `transaction` does.
    """
    try:
        conn = psycopg.connect(
            get_settings().database(),
            row_factory=dict_row,
            autocommit=autocommit,
            application_name="tunesmith",
            **_PATIENCE,
        )
        try:
            _check_schema(conn)
        except BaseException:
            conn.close()
            raise
        return conn
    except psycopg.OperationalError as error:
        raise migrate.unreachable(error) from error


def refuse_other_schema() -> None:
    """For long-lived processes at their start: raise TunesmithError when the schema is another program's. A database
    that does not answer yet is no reason to end: it is asked again at its first use."""
    with suppress(Unreachable):
        connect().close()


def _check_schema(conn: Connection) -> None:
    """Once a process and database."""
    database = get_settings().database()
    if database not in _checked:
        migrate.check(conn)
        _checked.add(database)


def load_queries(path: Path) -> Mapping[str, LiteralString]:
    """The named blocks (``-- name: promote``) of an .sql file that stands beside its owner.

    Use as ``SQL = load_queries(Path(__file__).with_suffix(".sql"))`` and ``conn.execute(SQL["promote"], {...})``.
    """
    blocks = re.split(r"^-- name: (\w+)\s*$", path.read_text(), flags=re.MULTILINE)
    return {name: cast(LiteralString, body.strip()) for name, body in zip(blocks[1::2], blocks[2::2], strict=True)}


def one(conn: Connection, query: LiteralString, params: Mapping[str, Any] | None = None) -> DictRow:
    """The first row, which must exist (an aggregate, or RETURNING)."""
    row = conn.execute(query, params).fetchone()
    if row is None:
        raise LookupError("the query returned no row")
    return row
