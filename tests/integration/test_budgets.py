"""Limits over several gateways, on real rows and real processes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from click.testing import CliRunner
from serving import Stand, add_version, make_stand, wait_for

from deploy import budgets, commands
from deploy.budgets import Budgets, Limit, OverLimit
from infra import ports
from infra.db import one, transaction
from infra.errors import NotFound, UsageError
from infra.settings import Settings
from registry import deployments
from tests.conftest import forget


@pytest.fixture
def stand(database: Settings) -> Iterator[Stand]:
    add_version("demo", 1)
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with make_stand(database.home) as stand, stand.running_engine(), stand.running_gateway():
        stand.wait_ready()
        yield stand


def key_id(stand: Stand, role: str = "service") -> str:
    return stand.keys[role].split("_")[1]


def limit(whose: str, kind: budgets.Kind, amount: float) -> None:
    scope, name = budgets.parse_whose(whose)
    with transaction() as conn:
        budgets.limit(conn, scope, name, {kind: amount}, actor="test")


def early_in_a_minute(needed: float = 20) -> None:
    """Spans are minutes of the clock, and a test wants to be within one."""
    with transaction() as conn:
        left = 60 - float(one(conn, "select extract(second from clock_timestamp())::float8 as s")["s"])
    if left < needed:
        time.sleep(left + 0.1)


def statuses(stand: Stand, count: int, role: str = "service") -> list[int]:
    return [stand.ask(role=role).status_code for _ in range(count)]


def test_a_limit_of_requests_holds_over_two_gateways(stand: Stand) -> None:
    second = replace(stand, url=f"http://127.0.0.1:{ports.free()}")
    with second.running_gateway():
        second.wait_ready()
        early_in_a_minute()
        limit(f"key:{key_id(stand)}", "requests", 10)
        time.sleep(2.2)  # within two seconds everywhere
        got = [each.ask() for _ in range(15) for each in (stand, second)]
        assert [event["status"] for event in stand.wait_events(30)].count(429) == 20
    assert [answer.status_code for answer in got].count(200) == 10
    refused = next(answer for answer in got if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "has used its limit: 10 requests a minute" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (refused.headers["x-ratelimit-limit-requests"], refused.headers["x-ratelimit-remaining-requests"]) == (
        "10", "0",
    )  # fmt: skip
    assert statuses(stand, 2, role="operator") == [200, 200]  # another key
    with transaction() as conn:
        assert [row["used"] for row in budgets.listing(conn)] == [10]


def test_tokens_and_money_are_counted_when_they_are_known(stand: Stand) -> None:
    early_in_a_minute()
    limit("model:demo", "tokens", 20)  # an answer here has 8
    time.sleep(2.2)
    assert statuses(stand, 5) == [200, 200, 200, 429, 429]
    with transaction() as conn:
        budgets.unlimit(conn, "model", "demo")
    limit(f"key:{key_id(stand)}", "usd", 5e-7)  # and costs 2.8e-7
    time.sleep(2.2)
    assert statuses(stand, 4) == [200, 200, 429, 429]
    assert "$5e-07 a day" in stand.ask().json()["error"]["message"]
    limit(f"key:{key_id(stand)}", "usd", 1.0)
    time.sleep(2.2)
    assert statuses(stand, 1) == [200]
    limit(f"key:{key_id(stand)}", "usd_month", 5e-7)  # counts from now on
    time.sleep(2.2)
    assert statuses(stand, 4) == [200, 200, 429, 429]
    assert "$5e-07 a month" in stand.ask().json()["error"]["message"]


def test_tokens_and_money_hold_over_two_gateways(stand: Stand) -> None:
    """Each gateway may be over by the answer that used the limit up."""
    second = replace(stand, url=f"http://127.0.0.1:{ports.free()}")
    with second.running_gateway():
        second.wait_ready()
        early_in_a_minute(30)
        kinds: tuple[tuple[budgets.Kind, float, float], ...] = (("tokens", 100, 8), ("usd", 2.8e-6, 2.8e-7))
        for kind, amount, each in kinds:
            limit(f"key:{key_id(stand)}", kind, amount)
            time.sleep(2.2)
            got = [one.ask().status_code for _ in range(15) for one in (stand, second)]
            assert set(got) == {200, 429}
            assert amount / each <= got.count(200) <= amount / each + 2, kind
            with transaction() as conn:
                budgets.unlimit(conn, "key", key_id(stand))


def test_requests_at_a_time_are_limited_for_keys_and_models(stand: Stand) -> None:
    limit(f"key:{key_id(stand)}", "concurrent", 2)
    limit("model:demo", "concurrent", 3)
    time.sleep(2.2)
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(stand.ask, text="slow", role=role) for role in ("service", "service", "operator")]
        wait_for(lambda: stand.stats()["active"] == 3)
        key, model = stand.ask(), stand.ask(role="operator")
        assert [key.status_code, model.status_code, key.headers["retry-after"]] == [429, 429, "1"]
        assert "key has as many under way as it may: 2 requests at a time" in key.json()["error"]["message"]
        assert "model demo has as many under way as it may: 3 requests at a time" in model.json()["error"]["message"]
        assert [answer.result().status_code for answer in slow] == [200, 200, 200]
    assert statuses(stand, 3) == [200, 200, 200], "places are free again"


def test_what_little_is_left_is_taken_in_small_parts_and_looked_for_again(
    database: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "_LOOK_AGAIN_SECONDS", 0.2)
    amount = budgets.Limit(scope="model", name="m", kind="usd", amount=100.0)
    assert [budgets._grant(amount, 0.0, 5.0)[0] for _ in range(16)] == [5.0] * 16
    granted = [budgets._grant(amount, 0.0, 5.0)[0] for _ in range(3)]
    assert granted == pytest.approx([5.0, 3.75, 2.8125]), "a quarter of what is left, at most"
    budgets._grant(amount, 100.0 - 80.0 - sum(granted), 0.0)  # and now all is taken

    async def ask() -> None:
        own = budgets.Budgets()
        own._set([amount])
        assert own.affords_copy("m")
        with pytest.raises(budgets.OverLimit):
            await own.admit("k", "m")
        assert not own.affords_copy("m"), "nor is a copy paid for"
        budgets._grant(amount, -2.0, 0.0)  # another gateway ends, and gives back
        with pytest.raises(budgets.OverLimit):
            await own.admit("k", "m")
        await asyncio.sleep(0.25)
        await own.admit("k", "m")
        own.spend_copy("m", 5.0)
        with pytest.raises(budgets.OverLimit):
            await own.admit("k", "m")

    asyncio.run(ask())


def test_a_month_ends_with_the_calendar_and_what_it_used_is_kept(database: Settings) -> None:
    for day, left in (("2026-02-28", 1), ("2026-12-01", 31), ("2028-02-01", 29)):
        assert budgets._rest("month", datetime.fromisoformat(f"{day}T00:00:00Z")) == left * 86_400
    rows = [("usd", "3 days"), ("usd_month", "31 days"), ("usd_month", "3 months"), ("tokens", "1 minute")]
    with transaction() as conn:
        for kind, ago in rows:
            conn.execute(
                "insert into spending (scope, name, kind, start) values ('key', 'k', %s, now() - %s::interval)",
                (kind, ago),
            )
        budgets.drop_old(conn)
        assert {row["kind"] for row in conn.execute("select kind from spending")} == {"usd_month", "tokens"}
        assert one(conn, "select count(*) as n from spending")["n"] == 2


RUNNER = asyncio.Runner()  # one loop, as a gateway has


def admitted(purses: Budgets, key: str, count: int) -> int:
    async def each() -> bool:
        try:
            await purses.admit(key, "demo")
        except OverLimit:
            return False
        return True

    async def work() -> int:
        return sum(await asyncio.gather(*(each() for _ in range(count))))

    return RUNNER.run(work())


@pytest.mark.parametrize("amount", [1, 7, 50])
def test_many_at_once_take_no_more_than_there_is(database: Settings, amount: int) -> None:
    early_in_a_minute(10)
    wanted = Limit(scope="key", name="k", kind="requests", amount=amount)
    total = 0
    for _ in range(3):
        purses = Budgets()
        purses._set([wanted])
        total += admitted(purses, "k", 100)
    assert total == amount


def test_a_refusal_of_the_models_limit_costs_the_key_nothing(database: Settings) -> None:
    early_in_a_minute(10)
    purses = Budgets()
    purses._set([
        Limit(scope="key", name="k", kind="requests", amount=100),
        Limit(scope="model", name="demo", kind="requests", amount=2),
    ])  # fmt: skip
    assert admitted(purses, "k", 30) == 2
    purse = purses._purses["key", "k", "requests"]
    assert purse.used - purse.left == pytest.approx(2)  # of what was taken for it


def test_while_the_database_is_away_a_gateway_counts_alone(database: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    early_in_a_minute(10)
    wanted = Limit(scope="key", name="k", kind="requests", amount=20)
    purses = Budgets()
    purses._set([wanted])
    with monkeypatch.context() as patch:
        patch.setenv("TUNESMITH_DATABASE_URL", f"postgresql://nobody:none@127.0.0.1:{ports.free()}/postgres")
        forget()
        assert admitted(purses, "k", 15) == 15
        assert admitted(purses, "k", 15) == 5
    forget()
    purses._set([replace(wanted, amount=25)])
    # What was used meanwhile is told, and counts
    assert admitted(purses, "k", 15) == 5
    with transaction() as conn:
        assert one(conn, "select sum(used) as n from spending")["n"] == 25


def test_a_gateway_that_ends_gives_back_what_it_did_not_use(database: Settings) -> None:
    early_in_a_minute(10)
    purses = Budgets()
    purses._set([Limit(scope="key", name="k", kind="requests", amount=100)])
    assert admitted(purses, "k", 7) == 7
    with transaction() as conn:
        assert one(conn, "select sum(used) as n from spending")["n"] == 10  # two parts of five
    RUNNER.run(purses.close())
    with transaction() as conn:
        assert one(conn, "select sum(used) as n from spending")["n"] == 7


def test_a_gateway_that_ends_tells_what_was_used_beyond_what_it_had(database: Settings) -> None:
    early_in_a_minute(10)
    purses = Budgets()
    purses._set([Limit(scope="key", name="k", kind="tokens", amount=100)])
    assert admitted(purses, "k", 1) == 1
    purses.spend("k", "demo", tokens=250, usd=0.0)
    RUNNER.run(purses.close())
    with transaction() as conn:
        assert one(conn, "select sum(used) as n from spending")["n"] == 250
    fresh = Budgets()
    fresh._set([Limit(scope="key", name="k", kind="tokens", amount=100)])
    assert admitted(fresh, "k", 1) == 0, "another gateway, or the same one begun again, does not forget it"


def test_a_database_that_hangs_is_told_once_of_what_was_used(
    database: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    early_in_a_minute(15)
    purses, hangs, grant = Budgets(), threading.Event(), budgets._grant

    def slow(*asked: Any) -> Any:
        hangs.wait(20)
        return grant(*asked)

    monkeypatch.setattr(budgets, "_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(budgets, "_grant", slow)
    purses._set([Limit(scope="key", name="k", kind="requests", amount=100)])
    assert sum(admitted(purses, "k", 1) for _ in range(40)) == 40  # eight parts of five
    hangs.set()
    RUNNER.run(asyncio.sleep(0.5))
    RUNNER.run(purses.close())
    with transaction() as conn:
        assert one(conn, "select sum(used) as n from spending")["n"] == 40


def test_limits_are_set_shown_and_taken_away(database: Settings) -> None:
    add_version("demo", 1)

    def run(command: Any, *arguments: str) -> Any:
        return CliRunner().invoke(command, list(arguments), env={"COLUMNS": "200"})

    assert run(commands.limit, "model:demo", "--requests-per-minute", "60", "--usd-per-day", "5").exit_code == 0
    assert run(commands.limit, "model:demo", "--usd-per-month", "60").exit_code == 0
    shown = run(commands.limits).output
    assert "60 requests a minute" in shown
    assert "5 usd a day" in shown
    assert "60 usd a month" in shown
    assert run(commands.limit, "model:demo", "--concurrent", "8").exit_code == 0
    assert "8 requests at a time" in run(commands.limits).output
    assert "no limit" in run(commands.limit, "model:demo", "--off").output
    for arguments, error in (
        (["model:none", "--usd-per-day", "1"], NotFound), (["key:none", "--usd-per-day", "1"], NotFound),
        (["demo", "--usd-per-day", "1"], UsageError), (["model:demo"], UsageError),
        (["model:demo", "--off", "--usd-per-day", "1"], UsageError),
    ):  # fmt: skip
        assert isinstance(run(commands.limit, *arguments).exception, error), arguments
