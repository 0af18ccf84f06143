"""Small drawings that stand in a table's row: an interval, the course of one figure, a row of heat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from monitoring.console.svg import Values, element, pct, runs, stretch
from registry.statistics import Estimate


def interval(
    e: Estimate, *, domain: tuple[float, float], zero: float | None = 0.0, tone: str = "plain", tip: str = ""
) -> Markup:
    """One row of a forest plot: the interval as a bar, the estimate as a dot, the line of no difference.

    `domain` is shared by the rows that may be compared by eye; ends outside it, or unknown, run to the edge without
    a cap.
    """
    left, right = domain
    whole = (right - left) or 1.0

    def x(value: float) -> float:
        return 3 + 94 * min(1.0, max(0.0, (value - left) / whole))

    parts = [element("line", x1="0%", x2="100%", y1=12, y2=12, class_="grid")]
    if zero is not None:
        parts.append(element("line", x1=pct(x(zero)), x2=pct(x(zero)), y1=0, y2=24, class_="zero"))
    if math.isfinite(e.low) or math.isfinite(e.high):
        parts.append(element("line", x1=pct(x(e.low)), x2=pct(x(e.high)), y1=12, y2=12, class_=f"whisker {tone}"))
    for end in (e.low, e.high):
        if left <= end <= right:
            parts.append(element("line", x1=pct(x(end)), x2=pct(x(end)), y1=8, y2=16, class_=f"cap {tone}"))
    if math.isfinite(e.estimate):
        parts.append(element("circle", cx=pct(x(e.estimate)), cy=12, r=4, class_=f"dot {tone}"))
    parts.append(element("rect", x=0, y=0, width="100%", height=24, class_="hit", data_tip=tip or None))
    return element("svg", *parts, width="100%", height=24, class_="interval", aria_hidden="true")


def sparkline(values: Values, *, title: str, height: int = 28, domain: tuple[float, float] | None = None) -> Markup:
    """The course of one figure, without axes: from zero to its largest, or over the `domain` rows share."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    low, high = domain or (0.0, max(known, default=0.0))
    whole = (high - low) or 1.0
    step = 1000 / max(1, len(values) - 1)
    paths = []
    for first, last in runs(values):
        points = [
            f"{i * step:.1f} {height - 2 - (height - 5) * ((values[i] or 0.0) - low) / whole:.1f}"
            for i in range(first, last + 1)
        ]
        joined = "L".join(points)
        if first == last:
            paths.append(element("path", d=f"M{joined}l14 0", class_="line c0", vector_effect="non-scaling-stroke"))
            continue
        paths.append(
            element("path", d=f"M{first * step:.1f} {height}L{joined}L{last * step:.1f} {height}Z", class_="area c0")
        )
        paths.append(element("path", d=f"M{joined}", class_="line c0", vector_effect="non-scaling-stroke"))
    return element(
        "svg",
        element("title", escape(title)),
        stretch(height, *paths),
        width="100%",
        height=height,
        class_="spark",
        role="img",
    )


def heat(cells: Sequence[tuple[float | None, str]], *, title: str, height: int = 22) -> Markup:
    """One row of a heat map: each cell is (statistic / threshold, tip); from 1 on it has drifted.

    Below the threshold the cells are quiet shades, from it on warm ones, so that the line is seen at once.
    """
    width = 100 / max(1, len(cells))
    parts = [element("title", escape(title))]
    for index, (ratio, tip) in enumerate(cells):
        parts.append(
            element(
                "rect",
                x=pct(index * width),
                width=pct(max(0.2, width - 0.4)),
                y=0,
                height=height,
                rx=2,
                class_=f"heat {_shade(ratio)}",
                data_tip=tip,
            )
        )
    return element("svg", *parts, width="100%", height=height, class_="strip", role="img")


def _shade(ratio: float | None) -> str:
    if ratio is None or math.isnan(ratio):
        return "none"
    return next((f"h{i}" for i, limit in enumerate((0.33, 0.66, 1.0, 1.5, 2.5)) if ratio < limit), "h5")
