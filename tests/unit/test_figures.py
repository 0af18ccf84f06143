"""Figures as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from monitoring import figures
from monitoring.console.svg import Write


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (figures.number, 12_400, "12.4k"),
        (figures.number, 1_234_567, "1.2M"),
        (figures.number, 0.0871, "0.0871"),
        (figures.number, 6.94e-5, "6.9e-5"),
        (figures.number, -3.2, "−3.2"),
        (figures.number, 0, "0"),
        (figures.milliseconds, 84.4, "84 ms"),
        (figures.milliseconds, 999.5, "1.0 s"),
        (figures.milliseconds, 999.7, "1.0 s"),
        (figures.seconds, 0.9997, "1.0 s"),
        (figures.milliseconds, 1234, "1.2 s"),
        (figures.seconds, 402, "7 min"),
        (figures.seconds, 7300, "2 h 2 min"),
        (figures.usd, 0.0031, "$0.0031"),
        (figures.usd, 0.00000512, "$0.0000051"),
        (figures.usd, 12.5, "$12.50"),
        (figures.percent, 0.125, "12.5 %"),
        (figures.percent, 1.0, "100 %"),
        (figures.signed, -0.3, "−0.3"),
        (figures.signed, 0.021, "+0.021"),
    ],
)
def test_a_figure_is_written_for_people(write: Write, value: float, text: str) -> None:
    assert write(value) == text


@pytest.mark.parametrize("write", [figures.number, figures.milliseconds, figures.usd, figures.percent, figures.signed])
def test_what_is_not_known_is_a_dash(write: Write) -> None:
    assert [write(v) for v in (None, math.nan, math.inf)] == ["–"] * 3


def test_times_are_relative_with_the_exact_one_in_the_title() -> None:
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    assert figures.ago(now - timedelta(minutes=3), now) == (
        '<time datetime="2026-11-24T11:57:00Z" title="2026-11-24 11:57:00 UTC">3 min ago</time>'
    )
    assert ">in 2 h<" in figures.ago(now + timedelta(hours=2), now)
    assert ">just now<" in figures.ago(now, now)


def test_prose_keeps_its_code_and_nothing_else() -> None:
    assert figures.marked("run `a <b>` & go") == "run <code>a &lt;b&gt;</code> &amp; go"
    assert figures.marked("one ` alone <i>") == "one ` alone &lt;i&gt;"


def test_digests_in_prose_are_short_and_whole_in_their_titles() -> None:
    whole = "sha256:" + "0123456789abcdef" * 4
    said = f"The bundle {whole} is <gone>; {whole[7:20]} is no digest."
    assert figures.short(said) == "The bundle 0123456789ab is <gone>; 0123456789abc is no digest."
    assert figures.marked(said) == (
        f'The bundle <code class="digest" title="{whole}">0123456789ab</code> is &lt;gone&gt;; '
        "0123456789abc is no digest."
    )


def test_people_are_named_as_their_keys_are() -> None:
    assert figures.actor("key:4f1c (Ada <b>)") == '<span title="key:4f1c (Ada &lt;b&gt;)">Ada &lt;b&gt;</span>'
    assert figures.actor("os:ann@here") == '<span title="os:ann@here">os:ann@here</span>'
