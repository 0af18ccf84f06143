"""The platform's tables as files, for a notebook or a spreadsheet: CSV, or Parquet."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from psycopg import sql
from psycopg.rows import tuple_row

from infra.db import Connection
from infra.errors import TunesmithError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

# What people call them -> the table, and the column that times are asked of. Nothing here holds a secret.
TABLES: Mapping[str, tuple[str, str]] = {
    "requests": ("request_event", "at"),
    "windows": ("traffic_window", "start"),
    "feedback": ("feedback", "at"),
    "verdicts": ("verdict", "at"),
    "rescorings": ("rescoring", "at"),
    "alerts": ("alert", "opened_at"),
    "ledger": ("ledger", "at"),
    "versions": ("version", "created_at"),
    "approvals": ("approval", "at"),
    "runs": ("run", "started_at"),
    "studies": ("study", "created_at"),
    "trials": ("rung_job", "updated_at"),
    "keys": ("key_usage", "day"),
}
Format = Literal["csv", "parquet"]
_ROWS = 10_000  # in memory at once
_TEXTS = (25, 1043)  # PostgreSQL's numbers of text and varchar


def write(
    conn: Connection, name: str, target: Path, *, since: datetime | None = None, until: datetime | None = None
) -> int:
    """Write a table, or its rows of a time, to a new file, whose ending says the format; how many rows. The file
    appears whole or not at all. In a CSV, texts that a spreadsheet would take for a formula begin with an apostrophe.
    Raises UsageError for another table or ending, or a file that is there."""
    if name not in TABLES:
        raise UsageError(f"There is no table {name[:80]!a}.", hint=f"There are {', '.join(TABLES)}.")
    endings: dict[str, Format] = {".csv": "csv", ".parquet": "parquet"}
    if (form := endings.get(target.suffix.lower())) is None:
        raise UsageError(f"{target} ends in neither .csv nor .parquet.", hint="Name it such as requests.parquet.")
    if target.exists():
        raise UsageError(f"{target} exists already.", hint="Name a file that does not.")
    table, at = TABLES[name]
    ends: list[date | None] = [None if end is None else end.astimezone(UTC) for end in (since, until)]
    if at == "day":
        ends = [end.date() if isinstance(end, datetime) else None for end in ends]
    columns = sql.SQL("*") if form == "parquet" else _harmless(conn, table)
    query = sql.SQL("select {columns} from {table} where {at} >= {since} and {at} <= {until} order by {at}").format(
        columns=columns,
        table=sql.Identifier(table),
        at=sql.Identifier(at),
        since=sql.Literal(ends[0] or "-infinity"),
        until=sql.Literal(ends[1] or "infinity"),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".table-", dir=target.parent) as folder:
            file = Path(folder, target.name)
            count = _csv(conn, query, file) if form == "csv" else _parquet(conn, query, file)
            file.rename(target)
    except OSError as error:
        raise TunesmithError(f"Writing {target} failed: {error.strerror or error}.", hint="Make room there.") from error
    return count


def _harmless(conn: Connection, table: str) -> sql.Composable:
    """The columns of a table; what clients wrote must not run in who opens it (OWASP, "CSV Injection")."""
    with conn.cursor() as cursor:
        cursor.execute(sql.SQL("select * from {} limit 0").format(sql.Identifier(table)))
        columns = [(column.name, column.type_code in _TEXTS) for column in cursor.description or ()]
    guarded = sql.SQL("case when {0} ~ '^[=+@\t\r-]' then chr(39) || {0} else {0} end as {0}")
    names = [guarded.format(sql.Identifier(name)) if text else sql.Identifier(name) for name, text in columns]
    return sql.SQL(", ").join(names)


def _csv(conn: Connection, query: sql.Composed, file: Path) -> int:
    """As PostgreSQL writes it: arrays and JSON in its own words, nothing for null."""
    copy = sql.SQL("copy ({}) to stdout (format csv, header)").format(query)
    with file.open("wb") as out, conn.cursor() as cursor:
        with cursor.copy(copy) as parts:
            for part in parts:
                out.write(part)
        return cursor.rowcount


def _parquet(conn: Connection, query: sql.Composed, file: Path) -> int:
    """JSON as text; times in UTC."""
    import pyarrow as pa
    from pyarrow import parquet

    count = 0
    with conn.cursor(f"table-{uuid.uuid4()}", row_factory=tuple_row) as cursor:
        cursor.execute(query)
        rows = cursor.fetchmany(_ROWS)
        columns = [(column.name, _type(column.type_code)) for column in cursor.description or ()]
        schema = pa.schema(columns)
        with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            while rows:
                parts = [
                    pa.array([_plain(row[n], text=kind == pa.string()) for row in rows], type=kind)
                    for n, (_, kind) in enumerate(columns)
                ]
                writer.write_table(pa.table(parts, schema=schema))
                count += len(rows)
                rows = cursor.fetchmany(_ROWS)
    return count


def _type(code: int) -> pa.DataType:
    """Of a column, by PostgreSQL's number of its type."""
    import pyarrow as pa

    known: dict[int, pa.DataType] = {
        16: pa.bool_(), 20: pa.int64(), 21: pa.int16(), 23: pa.int32(), 700: pa.float32(), 701: pa.float64(),
        1082: pa.date32(), 1184: pa.timestamp("us", tz="UTC"), 17: pa.binary(), 1021: pa.list_(pa.float32()),
        1009: pa.list_(pa.string()), 1007: pa.list_(pa.int32()),
    }  # fmt: skip
    return known.get(code, pa.string())


def _plain(value: Any, *, text: bool) -> Any:
    if not text or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
