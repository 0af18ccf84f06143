"""The console's pages on a million and on ten million events: how long each takes, and whether it stays so.

    .venv/bin/python tests/benchmarks/console.py [--short] [--events N ...]

A month of three models, as the console's tests have it: the events of its last hour, with their text, feedback and
windows, are repeated for each hour of thirty days, so that windows and events are each other's. Pages are those of the
gateway's own application, with an admin's session, from the request to the whole answer; so a figure is the
page's queries and its making. A target is printed, no time is asserted. Run it alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from _home import temporary_home
from console_seed import MODEL, seed
from starlette.testclient import TestClient

from deploy import recorder
from deploy.auth import create_key
from deploy.gateway import create_app
from infra.db import load_queries, transaction
from infra.settings import get_settings
from monitoring import windows
from monitoring.console.app import console_routes

SQL = load_queries(Path(__file__).with_suffix(".sql"))
SITE = "http://testserver"
DAYS = 30
HOURS = 24 * DAYS
TARGET = 150  # ms


def main() -> None:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--short", action="store_true", help="few events, to see that all of it works")
    reader.add_argument("--events", type=int, nargs="+", help="how many; 1 and 10 million")
    given = reader.parse_args()
    sizes = given.events or ([20_000, 100_000] if given.short else [1_000_000, 10_000_000])
    hourly = min(sizes) // HOURS
    found: list[Mapping[str, Sequence[float]]] = []
    counts: list[int] = []
    for size in sizes:
        with temporary_home():
            counts.append(fill(hourly, times=round(size / HOURS / hourly)))
            found.append(visit(8 if given.short else 40))
    show(counts, found)


def fill(hourly: int, *, times: int) -> int:
    """An hour of so many events, each of them so many times, for every hour of the month; how many there are."""
    say(f"writing about {hourly * times * HOURS:,} events")
    with psycopg.connect(get_settings().database(), autocommit=True) as conn:
        today = datetime.now(UTC).date()
        for day in (today - timedelta(days=ago) for ago in range(1, DAYS + 2)):
            conn.execute(
                f"create table request_event_{day:%Y%m%d} partition of request_event"
                f" for values from ('{day} 00:00:00+00') to ('{day + timedelta(days=1)} 00:00:00+00')"
            )
    with transaction() as conn:
        recorder.ensure_partitions(conn)
        seed(conn, requests=hourly)
        for _ in range(times - 1):
            conn.execute(SQL["again"])
        conn.execute(SQL["batch_again"])
        while windows.close(conn).events:
            pass
    for hours in range(1, HOURS):
        with transaction() as conn:
            for name in ("feedback_before", "windows_before", "events_before"):
                conn.execute(SQL[name], {"hours": hours})
    sum_up()
    with transaction() as conn:
        windows.drop_old(conn, 30)
    with psycopg.connect(get_settings().database(), autocommit=True) as conn:
        conn.execute("vacuum analyze")  # as autovacuum does in a month
        found = conn.execute("select count(*) from request_event").fetchone()
    assert found is not None
    return int(found[0])


def sum_up() -> None:
    """Windows of hours and days from those of their minutes."""
    with transaction() as conn:
        conn.execute("delete from traffic_window where grain <> 'minute'")
        first = windows.floor(datetime.now(UTC), "day") - timedelta(days=DAYS + 1)
        for day in (first + timedelta(days=n) for n in range(DAYS + 2)):
            sums: dict[tuple[str, int, windows.Grain, datetime], list[windows.Window]] = {}
            for row in conn.execute(SQL["minutes"], {"day": day}):
                for grain in ("hour", "day"):
                    key = (row["model"], row["version"], grain, windows.floor(row["start"], grain))
                    sums.setdefault(key, []).append(windows.from_row(row))
            for key, parts in sums.items():
                conn.execute(windows.SQL["put_window"], windows._row(key, windows.total(parts)))


def visit(times: int) -> dict[str, list[float]]:
    """Milliseconds of each page, by its name."""
    with transaction() as conn:
        key = create_key(conn, name="bench", role="admin").key
        request = conn.execute(SQL["some_request"]).fetchone()
        alert = conn.execute("select id from alert order by opened_at limit 1").fetchone()
        run = conn.execute("select id, study from run order by started_at limit 1").fetchone()
    assert request is not None
    assert alert is not None
    assert run is not None
    model = f"/models/{MODEL}"
    pages = [
        "/", "/alerts", f"/alerts/{alert['id']}", *(f"{model}?since={since}" for since in ("1h", "24h", "7d", "30d")),
        f"{model}/drift", f"{model}/drift?since=30d", f"{model}/cost", f"{model}/versions/2", "/requests",
        "/requests?since=30d", "/requests?status=error&since=30d", "/requests?slot=shadow&since=30d",
        f"/requests?model={MODEL}&version=1&since=30d", f"/requests?model={MODEL}&feedback=corrected&since=30d",
        f"/requests?model={MODEL}&version=1&status=error&since=30d",
        f"/requests?model={MODEL}&feedback=negative&since=30d", "/requests?model=empty-model&since=30d",
        f"/requests?since=30d&before={request['at'].isoformat()}/{request['id']}".replace("+", "%2B"),
        f"/requests/{request['id']}", f"/review?model={MODEL}", "/runs", f"/runs/{run['id']}", "/studies",
        f"/studies/{run['study']}", "/data", "/settings",
    ]  # fmt: skip
    took: dict[str, list[float]] = {}
    app = create_app(get_settings(), routes=console_routes())
    headers = {"accept": "text/html", "origin": SITE}
    with TestClient(app, base_url=SITE, follow_redirects=False, headers=headers) as client:
        client.post("/login", data={"key": key, "next": "/"})
        for number in range(times + 1):
            for page in pages:
                begun = time.perf_counter()
                answer = client.get(page)
                milliseconds = 1000 * (time.perf_counter() - begun)
                if answer.status_code != 200:
                    sys.exit(f"{page} answered {answer.status_code}: {answer.text[:1000]}")
                if number:  # the first round only warms up
                    ids = (request["id"], request["at"].isoformat().replace("+", "%2B"), alert["id"], run["id"])
                    took.setdefault(_name(page, ids), []).append(milliseconds)
    return took


def _name(page: str, ids: Sequence[object]) -> str:
    for each in ids:
        page = page.replace(str(each), "...")
    return page.replace("?", " ")[:75]


def show(counts: Sequence[int], found: Sequence[Mapping[str, Sequence[float]]]) -> None:
    print(f"\n{'page':<75}" + "".join(f"{count:>13,} events" for count in counts) + "   median, p95 in ms")
    worst = [0.0] * len(counts)
    for page in found[0]:
        cells = []
        for number, took in enumerate(each[page] for each in found):
            p95 = statistics.quantiles(took, n=20)[-1]
            worst[number] = max(worst[number], p95)
            cells.append(f"{statistics.median(took):10.1f} {p95:9.1f}")
        print(f"{page:<75}" + "".join(cells))
    print(f"{'worst p95 (target ' + str(TARGET) + ')':<75}" + "".join(f"{each:20.1f}" for each in worst))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
