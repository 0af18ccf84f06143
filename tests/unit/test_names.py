"""Hostile names (fault 13): refused with the pattern before they reach a query, a path or MLflow."""

from __future__ import annotations

import pytest

from infra.errors import UsageError
from registry.commands import parse_time
from registry.names import Ref, check_model_name, parse_ref, parse_share, parse_version

HOSTILE = [
    "../x",
    "%2e%2e",
    "a..b",
    " a",
    "a ",
    "a\n",
    "a\0",
    "A",
    "ä",
    "a\u202eb",
    "-a",
    "",
    "a/b",
    "a" * 64,
    "x" * 10_000,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_with_the_pattern_and_briefly(name: str) -> None:
    for parse in (
        check_model_name,
        parse_ref,
        lambda text: parse_ref(f"{text}:1"),
        lambda text: parse_ref(f"{text}@champion"),
    ):
        with pytest.raises(UsageError) as caught:
            parse(name)
        assert "^[a-z0-9][a-z0-9-]{0,62}$" in caught.value.hint
        assert len(caught.value.message) < 400
        assert caught.value.message.isascii()
        assert caught.value.message.isprintable()


def test_references() -> None:
    assert parse_ref("m") == Ref(model="m", slot="champion")
    assert parse_ref("m@shadow") == Ref(model="m", slot="shadow")
    assert parse_ref("m:7") == Ref(model="m", number=7)
    assert [str(parse_ref(text)) for text in ("m", "m@challenger", "a-1:12")] == [
        "m@champion",
        "m@challenger",
        "a-1:12",
    ]
    assert parse_version("m:7") == ("m", 7)
    for text in ("m:0", "m:01", "m:-1", "m:1e3", "m:", "m:٣", "m:9999999999", "m@best", "m:1:2"):
        with pytest.raises(UsageError):
            parse_ref(text)
    with pytest.raises(UsageError, match="names no version"):
        parse_version("m@champion")


def test_shares_and_times() -> None:
    assert [parse_share(text) for text in ("10%", "0.1", "100%", "2.5 %", "1%")] == [0.1, 0.1, 1.0, 0.025, 0.01]
    for text in ("1", "0", "0%", "101%", "ten", "-5%", "nan", "inf", "10%%", ""):
        with pytest.raises(UsageError):
            parse_share(text)
    assert parse_time("2026-11-23T14:00:00+02:00").isoformat() == "2026-11-23T12:00:00+00:00"
    assert parse_time("2026-11-23T14:00:00Z") == parse_time("2026-11-23 14:00")
    with pytest.raises(UsageError):
        parse_time("yesterday")
