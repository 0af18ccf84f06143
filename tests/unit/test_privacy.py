from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.privacy import find, redact

FOUND = {
    "mail bob.smith+x@mail.example.co.uk now": "mail [EMAIL] now",
    "call +49 30 1234567 today": "call [PHONE] today",
    "call (030) 1234 567, or 555-123-4567.": "call [PHONE], or [PHONE].",
    "card 4111 1111 1111 1111 ok": "card [CARD] ok",
    "card 378282246310005 ok": "card [CARD] ok",
    "to DE89 3704 0044 0532 0130 00 please": "to [IBAN] please",
    "GB82WEST12345698765432": "[IBAN]",
    "from 192.168.1.10 and 2001:db8::1": "from [IP] and [IP]",
    "key sk-proj-abcdefghijklmnopqrstuvwx": "key [KEY]",
    "AKIAIOSFODNN7EXAMPLE and ghp_abcdefghijklmnopqrstuvwxyz0123456789": "[KEY] and [KEY]",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----": "[KEY]",
}
LEFT = [
    "card 4111 1111 1111 1112",  # the check digit is wrong
    "DE89370400440532013002",
    "on 2026-11-23, 10.12.2024 or 2/20 at 6:00 pm",
    "1,234,567.89 and 3.14159265 and order 123456789012",
    "std::vector<a::b> at 12:30:45",
    "foo(a=10000000, b=0.5), @decorator, version 1.2.3",
    "localhost is 127.0.0.1",
]


@pytest.mark.parametrize("text", FOUND)
def test_finds(text: str) -> None:
    assert redact(text) == FOUND[text]


@pytest.mark.parametrize("text", LEFT)
def test_leaves(text: str) -> None:
    assert redact(text) == text


@given(st.text(alphabet="ab1234567890 +-().:@/[]_skE", max_size=80))
def test_redacting_twice_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


def test_of_two_that_overlap_the_kind_that_is_listed_first_stays() -> None:
    found = find("a@b.co 10.1.2.3, then 4111 1111 1111 1111 and c@d.co")
    assert [f.kind for f in found] == ["EMAIL", "IP", "CARD", "EMAIL"]
    assert all(one.end <= other.start for one, other in itertools.pairwise(found))
    assert redact("mail +49 30 1234567@example.org") == "mail +49 30 [EMAIL]"


@pytest.mark.parametrize(
    "piece",
    ["a", "1 ", "a@", "1-", "::", "+1 ", "aa11", "(12)", "a.", "sk-", "eyJa.", "12 34", "a@b.co ", "10.1.2.3 "],
)
def test_no_text_takes_long(piece: str) -> None:
    text = (piece * 100_000)[:200_000]
    begun = time.process_time()
    redact(text)
    assert time.process_time() - begun < 20  # one that goes back and forth takes minutes
