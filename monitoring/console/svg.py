"""The parts charts are drawn from: an element, the frame of a figure, its table.

Every horizontal position is a percentage, so that a chart fills its place at any width while its text and strokes
keep their size; lines live in a nested SVG that stretches (``vector-effect`` keeps their strokes). Colours come
from the style sheet by class, which gives dark and light, and no ``style`` attribute is needed, which keeps the
content security policy strict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

Values = Sequence[float | None]
Write = Callable[[float | None], str]


def element(tag: str, *children: Markup | str, **attributes: object) -> Markup:
    """One SVG element; ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``; None is left out."""
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_round(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(children)
    # Escaped above: the tag and the attributes' names are ours, their values go through `escape`.
    return Markup(f"<{tag}{text}>{inner}</{tag}>" if inner else f"<{tag}{text}/>")  # noqa: S704


def _round(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def pct(value: float) -> str:
    return _round(float(value)) + "%"


def stretch(height: int, *paths: Markup) -> Markup:
    return element("svg", *paths, width="100%", height=height, viewBox=f"0 0 1000 {height}", preserveAspectRatio="none")


def runs(values: Values) -> list[tuple[int, int]]:
    """The stretches (first, last) without a gap."""
    found: list[tuple[int, int]] = []
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            continue
        if found and found[-1][1] == index - 1:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found


def figure(
    *,
    key: str,
    title: str,
    description: str,
    height: int,
    body: Sequence[Markup],
    legend: Sequence[tuple[str, str]] = (),
    table: Markup | None = None,
    note: str = "",
) -> Markup:
    """The frame of a chart: caption with legend, drawing with title and description, table on demand."""
    keys = Markup("").join(
        Markup('<span class="key"><i class="swatch {}"></i>{}</span>').format(look, name) for name, look in legend
    )
    drawing = element(
        "svg",
        element("title", escape(title), id=f"{key}-title"),
        element("desc", escape(description), id=f"{key}-desc"),
        *body,
        width="100%",
        height=height,
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )
    more = (
        Markup(
            '<details id="{}-table"><summary>Show as a table</summary><div class="scroll">{}</div></details>'
        ).format(key, table)
        if table
        else Markup("")
    )
    aside = Markup('<span class="note">{}</span>').format(note) if note else Markup("")
    return Markup(
        '<figure class="chart"><figcaption><span class="name">{}</span>{}<span class="legend">{}</span></figcaption>'
        "{}{}</figure>"
    ).format(title, aside, keys, drawing, more)


def rows_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A plain table: the first column names the row."""
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(h) for h in head)
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], Markup("").join(Markup('<td class="n">{}</td>').format(cell) for cell in row[1:])
        )
        for row in rows
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(top, body)
