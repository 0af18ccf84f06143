"""Charts are well-formed, say their figures, keep gaps as gaps and take no markup from names."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest

from monitoring import figures
from monitoring.console import charts, strips
from monitoring.console.svg import element
from registry.statistics import Estimate

START = datetime(2026, 11, 24, tzinfo=UTC)
TIMES = charts.Times(
    starts=[START + timedelta(hours=i) for i in range(6)], since=START, until=START + timedelta(hours=6)
)
HOSTILE = '"><script>alert(1)</script>'


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")  # noqa: S314 - our own drawing


def test_a_gap_is_a_gap_and_a_lonely_point_a_dot() -> None:
    series = charts.Series(name="p95", values=[1.0, 2.0, None, 4.0, None, None], look="p95")
    drawn = parse(charts.lines(key="k", title="T", times=TIMES, series=[series], write=figures.number))
    paths = [p.get("d", "") for p in drawn.iter("path") if p.get("class") == "line p95"]
    assert len(paths) == 1
    assert paths[0].count("L") == 1
    assert len([c for c in drawn.iter("circle") if "dot" in (c.get("class") or "")]) == 1
    assert [cell.text for cell in drawn.iter("td")] == ["1", "2", "4"]
    assert "last 4" in (next(drawn.iter("desc")).text or "")


def test_names_from_outside_are_only_text() -> None:
    mark = charts.Mark(at=START, label=HOSTILE, tip=HOSTILE)
    span = charts.Span(since=START, until=TIMES.until, label=HOSTILE)
    series = [charts.Series(name=HOSTILE, values=[3.0] * 6), charts.Series(name="b", values=[1.0] * 6)]
    drawn = parse(
        charts.bars(
            key="k", title=HOSTILE, times=TIMES, series=series, write=figures.number, marks=[mark], spans=[span]
        )
    )
    assert not list(drawn.iter("script"))
    assert not [e for e in drawn.iter() if "style" in e.attrib or any(a.startswith("on") for a in e.attrib)]
    assert [t.text for t in drawn.iter("title")] == [HOSTILE]


def test_bars_stack_and_reach_the_axis() -> None:
    series = [charts.Series(name=n, values=[v] * 6, look=look) for n, v, look in (("a", 6.0, "c0"), ("b", 4.0, "c1"))]
    drawn = parse(charts.bars(key="k", title="T", times=TIMES, series=series, write=figures.number, height=116))
    low, high = (next(r for r in drawn.iter("rect") if r.get("class") == f"bar {c}") for c in ("c0", "c1"))
    assert float(low.get("y", 0)) + float(low.get("height", 0)) == pytest.approx(116)
    assert float(high.get("y", 0)) + float(high.get("height", 0)) == pytest.approx(float(low.get("y", 0)))
    assert float(high.get("y", 0)) >= 16


@pytest.mark.parametrize(("top", "expected"), [(9, [0, 5, 10]), (0.31, [0, 0.2, 0.4]), (86, [0, 50, 100]), (0, [0, 1])])
def test_ticks_are_round_and_reach_the_top(top: float, expected: list[float]) -> None:
    assert charts.ticks(top) == pytest.approx(expected)


def test_an_interval_that_runs_out_has_no_cap_there() -> None:
    e = Estimate(estimate=0.5, low=0.2, high=float("inf"), n=3, higher_is_better=True)
    drawn = parse(strips.interval(e, domain=(0.0, 1.0)))
    assert len([x for x in drawn.iter("line") if (x.get("class") or "").startswith("cap")]) == 1
    whisker = next(x for x in drawn.iter("line") if (x.get("class") or "").startswith("whisker"))
    assert whisker.get("x2") == "97%"


def test_heat_turns_warm_at_the_threshold() -> None:
    drawn = parse(strips.heat([(0.99, "a"), (1.0, "b"), (9.0, "c"), (None, "d")], title="t"))
    assert [r.get("class") for r in drawn.iter("rect")] == ["heat h2", "heat h3", "heat h5", "heat none"]


def test_attributes_are_escaped() -> None:
    assert element("a", x='"<&') == '<a x="&#34;&lt;&amp;"/>'


def test_what_is_not_over_yet_is_drawn_apart() -> None:
    times = dataclasses.replace(TIMES, unfinished=True)
    series = charts.Series(name="p95", values=[8.0, 8.0, 9.0, 8.0, 8.0, 1.0])
    lines = charts.lines(key="k", title="T", times=times, series=[series], write=figures.number, note="per hour")
    drawn = parse(lines)
    [path] = [p.get("d", "") for p in drawn.iter("path") if p.get("class") == "line c0"]
    assert path.count("L") == 4, "the line ends where the last whole hour does"
    assert len([c for c in drawn.iter("circle") if c.get("class") == "ring c0"]) == 1
    assert "last 8" in (next(drawn.iter("desc")).text or "")
    assert "per hour · ring: not over yet" in lines
    assert [th.text for th in drawn.iter("th")][-1] == "Nov 24, 05:00 – 06:00 UTC, so far"
    bars = parse(charts.bars(key="k", title="T", times=times, series=[series], write=figures.number))
    assert [r.get("class") for r in bars.iter("rect") if "bar" in (r.get("class") or "")][-2:] == [
        "bar c0", "bar c0 so-far",
    ]  # fmt: skip
