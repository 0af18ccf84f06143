"""From a request's ``model`` to a version."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.routing import Route, Served, Table, parse, pick, share_of
from infra.errors import NotFound, Unreachable, UsageError
from registry.pricing import MachinePrice
from registry.profile import Extractor, Profile


def served(number: int) -> Served:
    return Served(
        model="m",
        number=number,
        base_digest="b",
        adapter=f"m-v{number}",
        adapter_path=None,
        system=None,
        generation={},
        extractor=Extractor(Profile(histograms={})),
        price=MachinePrice(per_machine_hour_usd=1),
        keep_text=False,
        created=0,
    )


def test_names() -> None:
    assert parse("m").slot is None
    assert parse("m@challenger").slot == "challenger"
    assert parse("m:7").number == 7
    hostile: list[Any] = [
        "",
        "M",
        "m:",
        "m:0",
        "m:07",
        "m@shadow",
        "m@champion:1",
        "a..b",
        "-m",
        "m\n",
        "m:٣",
        None,
        3,
        "x" * 64,
    ]
    for text in hostile:
        with pytest.raises(UsageError) as error:
            parse(text)
        assert "^[a-z0-9]" in error.value.hint


def test_slots() -> None:
    one, two, three = served(1), served(2), served(3)
    route = Route(model="m", generation=1, champion=one, challenger=two, share=0.25)
    table = Table(routes={"m": route}, resident={("m", n): s for n, s in ((1, one), (2, two), (3, three))})
    assert pick(table, parse("m@champion"), "x") == (one, "pinned"), "named, and not drawn"
    assert pick(table, parse("m@challenger"), "x") == (two, "pinned")
    assert pick(table, parse("m:3"), "x") == (three, "pinned")
    assert pick(table, parse("m:4"), "x") is None
    share = sum(pick(table, parse("m"), f"user{i}") == (two, "challenger") for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03
    with pytest.raises(NotFound):
        pick(table, parse("other"), "x")
    with pytest.raises(NotFound):
        pick(Table(routes={"m": Route(model="m", generation=1, champion=one)}), parse("m@challenger"), "x")
    with pytest.raises(Unreachable):
        pick(Table(routes={"m": Route(model="m", generation=0)}), parse("m"), "x")


def test_shares_are_sticky_and_another_rollout_takes_others() -> None:
    users = [f"user{i}" for i in range(2000)]
    first = {u for u in users if share_of(u, "2:m") < 0.1}
    grown = {u for u in users if share_of(u, "2:m") < 0.2}
    other = {u for u in users if share_of(u, "3:m") < 0.1}
    assert first <= grown
    assert len(first & other) < len(first) / 3
