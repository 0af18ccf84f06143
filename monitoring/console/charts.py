"""Charts over time and distributions, drawn on the server as SVG; each has a title, a description and its figures
as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from markupsafe import Markup, escape

from monitoring.console.svg import Values, Write, element, figure, pct, rows_table, runs, stretch

PALETTE = 6  # classes c0 ... c5 in console.css
_AXIS = 20  # pixels under the plot for its times
_STEPS = [60, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 2 * 86400, 7 * 86400, 14 * 86400, 30 * 86400]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values over the chart's times; None where nothing is known. `look` is a class of the style sheet."""

    name: str
    values: Values
    look: str = "c0"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened: a line over the whole height, with a short label and a tip."""

    at: datetime
    label: str
    tip: str
    look: str = ""


@dataclass(frozen=True, kw_only=True)
class Span:
    """From when until when a version served."""

    since: datetime
    until: datetime
    label: str
    look: str = "c0"


@dataclass(frozen=True, kw_only=True)
class Times:
    """The chart's buckets: their starts, and the whole range. `unfinished`: the last one is not over yet, and is drawn
    apart, since a part of an hour beside whole ones looks like a fall."""

    starts: Sequence[datetime]
    since: datetime
    until: datetime
    unfinished: bool = False

    @property
    def whole(self) -> int:
        """How many buckets are over."""
        return len(self.starts) - self.unfinished

    def x(self, at: datetime) -> float:
        """0 to 100."""
        whole = (self.until - self.since).total_seconds() or 1.0
        return min(100.0, max(0.0, 100 * (at - self.since).total_seconds() / whole))

    def ends(self, index: int) -> datetime:
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.until


def ticks(top: float, about: int = 3, *, least: float = 0.0) -> list[float]:
    """Round figures from zero that reach `top`, at least `least` apart."""
    if not math.isfinite(top) or top <= 0:
        return [0.0, 1.0]
    raw = max(top / about, least)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def _time_ticks(times: Times) -> list[tuple[float, str]]:
    seconds = (times.until - times.since).total_seconds()
    step = next((s for s in _STEPS if seconds / s <= 7), _STEPS[-1])
    at = datetime.fromtimestamp(math.ceil(times.since.timestamp() / step) * step, UTC)
    found = []
    while at <= times.until:
        midnight = at.hour == 0 and at.minute == 0
        found.append((times.x(at), f"{at:%b} {at.day}" if midnight or step >= 86400 else f"{at:%H:%M}"))
        at += timedelta(seconds=step)
    return found


def _time_axis(times: Times, height: int) -> list[Markup]:
    parts = []
    for index, (x, label) in enumerate(_time_ticks(times)):
        anchor = "start" if x < 3 else "end" if x > 97 else "middle"
        parts.append(element("line", x1=pct(x), x2=pct(x), y1=height, y2=height + 4, class_="tick"))
        parts.append(
            element(
                "text",
                escape(label),
                x=pct(x),
                y=height + 16,
                text_anchor=anchor,
                class_="label minor" if index % 2 else "label",
            )
        )
    return parts


def _value_grid(marks: Sequence[float], height: int, room: int) -> list[Markup]:
    parts = []
    for value in marks:
        y = _y(value, marks[-1], height, room)
        parts.append(element("line", x1="0%", x2="100%", y1=y, y2=y, class_="grid" if value else "grid base"))
    return parts


def _value_labels(marks: Sequence[float], height: int, room: int, write: Write) -> list[Markup]:
    """What the grid's lines stand for; drawn last, so that nothing covers it."""
    return [
        element("text", escape(write(value)), x=0, y=_y(value, marks[-1], height, room) - 4, class_="label halo")
        for value in marks
        if value
    ]


def _y(value: float, top: float, height: int, room: int) -> float:
    return round(height - (height - room) * min(1.0, value / top), 2)


def _top(series: Sequence[Series]) -> float:
    return max((v for s in series for v in s.values if v is not None and math.isfinite(v)), default=0.0)


def _when(times: Times, index: int) -> str:
    so_far = ", so far" if index >= times.whole else ""
    return f"{_short(times.starts[index])} – {times.ends(index).astimezone(UTC):%H:%M} UTC{so_far}"


def _short(at: datetime) -> str:
    at = at.astimezone(UTC)
    return f"{at:%b} {at.day}, {at:%H:%M}"


def _hits(times: Times, series: Sequence[Series], height: int, write: Write) -> list[Markup]:
    """Invisible columns that say their figures when pointed at."""
    parts = []
    for index in range(len(times.starts)):
        known = [(s.name, s.values[index]) for s in series if s.values[index] is not None]
        if known:
            x, end = times.x(times.starts[index]), times.x(times.ends(index))
            tip = "\n".join([_when(times, index), *(f"{name}  {write(value)}" for name, value in known)])
            parts.append(
                element("rect", x=pct(x), y=0, width=pct(max(0.2, end - x)), height=height, class_="hit", data_tip=tip)
            )
    return parts


def _marks(times: Times, marks: Sequence[Mark], height: int) -> list[Markup]:
    """Lines with flags; a flag that would cover its neighbour goes one row down, the third keeps its line only."""
    parts: list[Markup] = []
    free = [-100.0, -100.0]
    for mark in sorted(marks, key=lambda m: m.at):
        x = times.x(mark.at)
        row = next((i for i, last in enumerate(free) if x - last >= 9), None)
        parts.append(element("line", x1=pct(x), x2=pct(x), y1=0, y2=height, class_=f"mark {mark.look}"))
        if row is not None:
            free[row] = x
            anchor, dx = ("end", -5) if x > 88 else ("start", 5)
            parts.append(
                element(
                    "text",
                    escape(mark.label),
                    x=pct(x),
                    dx=dx,
                    y=11 + 14 * row,
                    text_anchor=anchor,
                    class_=f"label halo flag {mark.look}",
                )
            )
        parts.append(element("line", x1=pct(x), x2=pct(x), y1=0, y2=height, class_="hit wide", data_tip=mark.tip))
    return parts


def lines(
    *,
    key: str,
    title: str,
    times: Times,
    series: Sequence[Series],
    write: Write,
    marks: Sequence[Mark] = (),
    band: tuple[int, int] | None = None,
    height: int = 180,
    note: str = "",
) -> Markup:
    """Lines over time. `band` shades the room between two of the series (p50 to p95, say); a single series is
    shaded down to zero. An unfinished bucket is a ring that no line leads to."""
    room = 34 if marks else 16
    scale = ticks(_top(series))
    mid = [10 * times.x(start + (times.ends(i) - start) / 2) for i, start in enumerate(times.starts)]

    def point(s: Series, i: int) -> str:
        return f"{mid[i]:.1f} {_y(s.values[i] or 0.0, scale[-1], height, room)}"

    paths, dots = [], []
    if len(series) == 1:
        for first, last in runs(series[0].values[: times.whole]):
            inner = "L".join(point(series[0], i) for i in range(first, last + 1))
            paths.append(
                element(
                    "path",
                    d=f"M{mid[first]:.1f} {height}L{inner}L{mid[last]:.1f} {height}Z",
                    class_=f"area {series[0].look}",
                )
            )
    if band:
        low, high = series[band[0]], series[band[1]]
        both = [None if a is None or b is None else a for a, b in zip(low.values, high.values, strict=True)]
        for first, last in runs(both[: times.whole]):
            there = "L".join(point(high, i) for i in range(first, last + 1))
            back = "L".join(point(low, i) for i in range(last, first - 1, -1))
            paths.append(element("path", d=f"M{there}L{back}Z", class_=f"area {low.look}"))
    for s in reversed(series):  # the first one named lies on top
        for first, last in runs(s.values[: times.whole]):
            if first == last:
                y = _y(s.values[first] or 0.0, scale[-1], height, room)
                dots.append(element("circle", cx=pct(mid[first] / 10), cy=y, r=2.5, class_=f"dot {s.look}"))
            else:
                d = "M" + "L".join(point(s, i) for i in range(first, last + 1))
                paths.append(element("path", d=d, class_=f"line {s.look}", vector_effect="non-scaling-stroke"))
        if times.unfinished and (so_far := s.values[-1]) is not None:
            y = _y(so_far, scale[-1], height, room)
            dots.append(element("circle", cx=pct(mid[-1] / 10), cy=y, r=3, class_=f"ring {s.look}"))
    body = [
        *_value_grid(scale, height, room),
        stretch(height, *paths),
        *dots,
        *_value_labels(scale, height, room, write),
        *_time_axis(times, height),
        *_hits(times, series, height, write),
        *_marks(times, marks, height),
    ]
    return figure(
        key=key,
        title=title,
        description=_describe(times, series, write),
        height=height + _AXIS,
        body=body,
        note=_noted(note, times, series, "ring"),
        legend=[(s.name, s.look) for s in series] if len(series) > 1 else (),
        table=_table(times, series, write),
    )


def bars(
    *,
    key: str,
    title: str,
    times: Times,
    series: Sequence[Series],
    write: Write,
    marks: Sequence[Mark] = (),
    spans: Sequence[Span] = (),
    height: int = 180,
    note: str = "",
    least: float = 1.0,
) -> Markup:
    """Stacked bars over time, with a strip under them that says who served; the axis' marks are `least` apart. An
    unfinished bucket is pale."""
    room = 34 if marks else 16
    totals = [sum(s.values[i] or 0.0 for s in series) for i in range(len(times.starts))]
    scale = ticks(max(totals, default=0.0), least=least)
    body = _value_grid(scale, height, room)
    for index in range(len(times.starts)):
        x, end, below = times.x(times.starts[index]), times.x(times.ends(index)), 0.0
        gap = min(0.3, (end - x) * 0.2)
        for s in series:
            if value := s.values[index]:
                y1, y2 = (_y(v, scale[-1], height, room) for v in (below, below + value))
                below += value
                body.append(
                    element(
                        "rect",
                        x=pct(x + gap / 2),
                        width=pct(max(0.1, end - x - gap)),
                        y=y2,
                        height=round(max(0.5, y1 - y2), 2),
                        class_=f"bar {s.look}{' so-far' if index >= times.whole else ''}",
                    )
                )
    axis = height
    if spans:
        axis += 26
        for span in spans:
            x, end = times.x(span.since), times.x(span.until)
            tip = f"{span.label} served\n{_short(span.since)} – {_short(span.until)} UTC"
            body.append(
                element(
                    "rect",
                    x=pct(x),
                    width=pct(max(0.3, end - x)),
                    y=height + 6,
                    height=16,
                    rx=3,
                    class_=f"span {span.look}",
                    data_tip=tip,
                )
            )
            if end - x > 8:
                body.append(
                    element("text", escape(span.label), x=pct(x), dx=7, y=height + 18, class_="label span-name")
                )
    body += [
        *_value_labels(scale, height, room, write),
        *_time_axis(times, axis),
        *_hits(times, series, height, write),
        *_marks(times, marks, axis),
    ]
    return figure(
        key=key,
        title=title,
        description=_describe(times, series, write),
        height=axis + _AXIS,
        body=body,
        note=_noted(note, times, series, "pale"),
        legend=[(s.name, s.look) for s in series] if len(series) > 1 else (),
        table=_table(times, series, write),
    )


def _noted(note: str, times: Times, series: Sequence[Series], look: str) -> str:
    """A chart's note, with how what is not over yet looks, where there is any."""
    shown = times.unfinished and any(s.values[-1] for s in series)
    return " · ".join(part for part in (note, f"{look}: not over yet" if shown else "") if part)


def _describe(times: Times, series: Sequence[Series], write: Write) -> str:
    parts = []
    for s in series:
        known = [v for v in s.values[: times.whole] if v is not None and math.isfinite(v)]
        if known:
            parts.append(f"{s.name}: {write(min(known))} to {write(max(known))}, last {write(known[-1])}.")
    return " ".join(parts) or "No figures in this time."


def _table(times: Times, series: Sequence[Series], write: Write) -> Markup:
    rows = [
        [_when(times, i), *(write(s.values[i]) for s in series)]
        for i in range(len(times.starts))
        if any(s.values[i] is not None for s in series)
    ]
    return rows_table(["Time", *(s.name for s in series)], rows[-200:])


def histogram(
    *,
    key: str,
    title: str,
    labels: Sequence[str],
    reference: Sequence[float],
    live: Sequence[float],
    write: Write,
    reference_name: str,
    live_name: str,
    height: int = 190,
) -> Markup:
    """Two distributions over the same bins, as shares of one: the reference wide and quiet, live narrow over it."""
    count, room = max(1, len(labels)), 16
    scale = ticks(max([*reference, *live, 1e-9]))
    body = _value_grid(scale, height, room)
    width = 100 / count
    every = max(1, math.ceil(count / 8))
    for i, label in enumerate(labels):
        x = i * width
        for value, share, look in ((reference[i], 0.86, "reference"), (live[i], 0.42, "c0")):
            y = _y(value, scale[-1], height, room)
            body.append(
                element(
                    "rect",
                    x=pct(x + width * (1 - share) / 2),
                    width=pct(width * share),
                    y=y,
                    rx=1,
                    height=round(height - y, 2),
                    class_=f"bar {look}",
                )
            )
        if i % every == 0:
            narrow = "label minor" if (i // every) % 2 else "label"
            anchor, at = ("start", x) if i == 0 else ("end", x + width) if i == count - 1 else ("middle", x + width / 2)
            body.append(element("text", escape(label), x=pct(at), y=height + 15, text_anchor=anchor, class_=narrow))
        tip = f"{label}\n{reference_name}  {write(reference[i])}\n{live_name}  {write(live[i])}"
        body.append(element("rect", x=pct(x), width=pct(width), y=0, height=height, class_="hit", data_tip=tip))
    body += _value_labels(scale, height, room, write)
    table = rows_table(
        ["Bin", reference_name, live_name],
        [[label, write(r), write(v)] for label, r, v in zip(labels, reference, live, strict=True)],
    )
    moved = sum(abs(r - v) for r, v in zip(reference, live, strict=True)) / 2
    return figure(
        key=key,
        title=title,
        description=f"{write(moved)} of the distribution lies elsewhere than in the reference.",
        height=height + _AXIS,
        body=body,
        legend=[(reference_name, "reference"), (live_name, "c0")],
        table=table,
    )
