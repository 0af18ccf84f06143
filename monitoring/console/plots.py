"""Charts of a search, drawn on the server as SVG: what its trials came to, in the order they were begun, along their
training, and by what each was given."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from monitoring.console.svg import element, figure, pct, rows_table, stretch
from monitoring.figures import DASH, number

_AXIS = 20  # pixels under the plot
_ROOM = 18  # pixels over the highest grid line, for its label
_CHOICES = 4  # as many different numbers are drawn as choices, evenly apart
_SHADES = 4  # classes p0 (lowest losses) ... p3 of the parallel coordinates
_EDGE = 5.0  # percent that the outer axes of the parallel coordinates keep from the edges


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A configuration and its validation losses, (steps, loss) by rung."""

    number: int
    params: Mapping[str, Any]
    course: Sequence[tuple[int, float]] = ()
    best: bool = False
    failed: bool = False

    @property
    def loss(self) -> float | None:
        """The lowest one, by which the winner is chosen; None before the first rung."""
        return min((loss for _, loss in self.course), default=None)

    def tip(self, names: Sequence[str]) -> str:
        """What is said when it is pointed at."""
        head = f"Trial {self.number}{', the best' if self.best else ', failed' if self.failed else ''}"
        losses = [f"loss {number(loss, 4)} after {steps} steps" for steps, loss in self.course]
        given = [f"{words(name)}  {written(self.params[name])}" for name in names if name in self.params]
        return "\n".join([head, *losses, *given])


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to 0 ... 1; what lies outside sticks to the edge."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self._bent(self.low), self._bent(self.high)
        value = self._bent(max(value, self.low))
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))

    def ticks(self, about: int = 4) -> list[float]:
        """Round figures within the scale; powers of ten on a long logarithmic one."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers] if len(powers) > 1 else [self.low, self.high]
        raw = (self.high - self.low) / about
        if raw <= 0:
            return [self.low]
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A parameter's values on a scale, or as choices side by side."""

    name: str
    scale: Scale | None = None
    choices: Sequence[Any] = ()

    def at(self, value: Any) -> float | None:
        """0 to 1; None for a value that the axis does not have, as of a parameter that was not drawn."""
        if self.scale is not None:
            return self.scale.at(value) if _is_number(value) else None
        return (self.choices.index(value) + 0.5) / len(self.choices) if value in self.choices else None

    def labels(self) -> list[tuple[float, str]]:
        if self.scale is not None:
            return [(self.scale.at(tick), number(tick)) for tick in self.scale.ticks(3)]
        return [((i + 0.5) / len(self.choices), written(choice)) for i, choice in enumerate(self.choices)]


def axis(name: str, values: Sequence[Any], *, log: bool = False) -> Axis:
    """How a parameter is drawn whose trials had these values, drawn from a logarithmic range or not."""
    known = [v for v in values if v is not None]
    choices = list({written(v): v for v in known}.values())
    if all(_is_number(v) for v in known):
        if len(choices) <= _CHOICES:
            return Axis(name=name, choices=sorted(choices))
        low, high = min(known), max(known)
        return Axis(name=name, scale=Scale(low=low, high=high, log=log and low > 0))
    return Axis(name=name, choices=sorted(choices, key=written))


def varied(trials: Sequence[Trial]) -> list[str]:
    """The parameters in which the trials differ."""
    names = sorted({name for t in trials for name in t.params})
    return [n for n in names if len({written(t.params.get(n)) for t in trials}) > 1]


def words(name: str) -> str:
    return name.replace("_", " ")


def written(value: Any) -> str:
    """A parameter's value for people."""
    if value is None:
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return number(value) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _losses(values: Sequence[float]) -> Scale:
    """The losses' scale: all of them, but not those that are so far off that the others could not be told apart."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    quarter, most = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    if len(ordered) >= 4 and high > most + 3 * (most - quarter) > low:
        high = most + 3 * (most - quarter)
    pad = (high - low) * 0.06 or abs(low) * 0.05 or 1.0
    return Scale(low=low - pad, high=high + pad)


def _y(scale: Scale, value: float, height: int) -> float:
    return round(height - (height - _ROOM) * scale.at(value), 2)


def _grid(scale: Scale, height: int) -> tuple[list[Markup], list[Markup]]:
    """The lines, to be drawn first, and what they stand for, to be drawn last."""
    marks = scale.ticks()
    drawn = [element("line", x1="0%", x2="100%", y1=height, y2=height, class_="grid base")]
    drawn += [
        element("line", x1="0%", x2="100%", y1=_y(scale, m, height), y2=_y(scale, m, height), class_="grid")
        for m in marks
    ]
    labels = [
        element("text", escape(number(m, 4)), x=0, y=_y(scale, m, height) - 4, class_="label halo") for m in marks
    ]
    return drawn, labels


def _below(labels: Sequence[tuple[float, str]], height: int, inset: float = 0.0) -> list[Markup]:
    """The horizontal axis: (0 to 100, text)."""
    parts = []
    for x, text in labels:
        at = inset + x * (100 - 2 * inset) / 100
        anchor = "start" if at < 6 else "end" if at > 94 else "middle"
        parts.append(element("line", x1=pct(at), x2=pct(at), y1=height, y2=height + 4, class_="tick"))
        parts.append(element("text", escape(text), x=pct(at), y=height + 16, text_anchor=anchor, class_="label"))
    return parts


def _dot(t: Trial, x: float, y: float, tip: str, look: str = "") -> Markup:
    look = look or ("best" if t.best else "trial")
    return element("circle", cx=pct(x), cy=y, r=5 if t.best else 4, class_=f"dot {look}", data_tip=tip)


def history(trials: Sequence[Trial], *, height: int = 210) -> Markup:
    """Each trial's loss in the order they were begun, and the best so far."""
    names, order = varied(trials), sorted(trials, key=lambda t: t.number)
    known = [t.loss for t in order if t.loss is not None]
    if not known:
        return Markup("")
    scale = _losses(known)
    grid, labels = _grid(scale, height)
    step = 100 / len(order)
    centre = {t.number: step * (i + 0.5) for i, t in enumerate(order)}
    path, dots, rows, least = "", [], [], math.inf
    for t in order:
        x = centre[t.number]
        if t.loss is None:
            if t.failed:
                dots.append(element("text", "×", x=pct(x), y=height - 4, text_anchor="middle", class_="cross",
                                    data_tip=t.tip(names)))  # fmt: skip
            continue
        if t.loss < least:
            y, least = _y(scale, t.loss, height), t.loss
            path += f"H{10 * x:.1f}V{y}" if path else f"M{10 * x:.1f} {y}"
        dots.append(_dot(t, x, _y(scale, t.loss, height), t.tip(names)))
        rows.append([f"{t.number}", number(t.loss, 4), number(least, 4)])
    best = element("path", d=path + "H1000", class_="line best", vector_effect="non-scaling-stroke")
    every = max(1, math.ceil(len(order) / 8))
    axis_labels = [(centre[t.number], f"{t.number}") for t in order[::every]]
    return figure(
        key="history",
        title="History",
        description=f"The lowest loss of {len(known)} trials was {number(least, 4)}.",
        height=height + _AXIS,
        body=[*grid, stretch(height, best), *dots, *labels, *_below(axis_labels, height)],
        note="lowest validation loss of each trial",
        legend=[("best so far", "best"), ("trial", "trial")],
        table=rows_table(["Trial", "Lowest loss", "Best so far"], rows),
    )


def courses(trials: Sequence[Trial], rungs: Sequence[int], *, height: int = 210) -> Markup:
    """Validation loss along the steps of training, a line a trial through the rungs it reached."""
    measured = [t for t in trials if t.course]
    if not measured or not rungs:
        return Markup("")
    names = varied(trials)
    along = Scale(low=rungs[0] / 1.6, high=max(rungs[-1], rungs[0] + 1), log=True)
    scale = _losses([loss for t in measured for _, loss in t.course])
    grid, labels = _grid(scale, height)
    paths, dots = [], []
    for t in sorted(measured, key=lambda t: (t.best, t.number)):
        points = [(100 * along.at(steps), _y(scale, loss, height)) for steps, loss in t.course]
        if len(points) > 1:
            d = "L".join(f"{10 * x:.1f} {y}" for x, y in points)
            look = "best" if t.best else "trial"
            paths.append(element("path", d=f"M{d}", class_=f"line {look}", vector_effect="non-scaling-stroke"))
        dots += [_dot(t, x, y, t.tip(names)) for x, y in points]
    return figure(
        key="courses",
        title="Learning curves",
        description=f"{len(measured)} trials, measured after {', '.join(str(r) for r in rungs)} steps.",
        height=height + _AXIS,
        body=[
            *(element("line", x1=pct(100 * along.at(r)), x2=pct(100 * along.at(r)), y1=0, y2=height, class_="grid")
              for r in rungs),
            *grid, stretch(height, *paths), *dots, *labels,
            *_below([(100 * along.at(r), f"{r}") for r in rungs], height),
        ],
        note="validation loss by steps",
        legend=[("best trial", "best"), ("other trials", "trial")],
        table=rows_table(
            ["Trial", *(f"{r} steps" for r in rungs)],
            [[t.number, *(number(dict(t.course).get(r), 4) for r in rungs)] for t in measured],
        ),
    )  # fmt: skip


def slices(trials: Sequence[Trial], *, logs: Container[str] = (), height: int = 130) -> list[Markup]:
    """Loss against each parameter that varies, a chart each, all on one scale of losses."""
    measured = [t for t in trials if t.loss is not None]
    if len(measured) < 2:
        return []
    names = varied(trials)
    scale = _losses([t.loss for t in measured if t.loss is not None])
    found: list[Markup] = []
    for name in varied(measured):
        grid, labels = _grid(scale, height)
        along, dots = axis(name, [t.params.get(name) for t in trials], log=name in logs), []
        for t in sorted(measured, key=lambda t: (t.best, t.number)):
            at = along.at(t.params.get(name))
            if at is not None and t.loss is not None:
                dots.append(_dot(t, 4 + 92 * at, _y(scale, t.loss, height), t.tip(names)))
        marks = along.labels()
        room = max(4, 30 // max(1, len(marks)))  # characters, so that neighbours do not overlap
        texts = [text if len(text) <= room else f"{text[: room - 1]}…" for _, text in marks]
        below = _below([(100 * at, text) for (at, _), text in zip(marks, texts, strict=True)], height, inset=4)
        found.append(
            figure(
                key=f"slice-{len(found)}",
                title=words(name),
                description=f"Lowest validation loss of each trial by {words(name)}.",
                height=height + _AXIS,
                body=[*grid, *dots, *labels, *below],
            )
        )
    return found


def parallel(trials: Sequence[Trial], *, logs: Container[str] = (), height: int = 250) -> Markup:
    """A line a trial through all that it was given to its loss, the lowest losses on top and strongest."""
    measured = sorted((t for t in trials if t.loss is not None), key=lambda t: -(t.loss or 0.0))
    names = varied(measured)
    if len(measured) < 2 or not names:
        return Markup("")
    axes = [axis(name, [t.params.get(name) for t in measured], log=name in logs) for name in names]
    losses = _losses([t.loss for t in measured if t.loss is not None])
    places = [_EDGE + i * (100 - 2 * _EDGE) / len(axes) for i in range(len(axes) + 1)]

    head = 16 * max(len(_folded(words(a.name))) for a in axes)

    def y(share: float) -> float:
        return round(height - 4 - (height - head - 16) * share, 1)

    ways = []
    for rank, t in enumerate(measured):
        shares = [a.at(t.params.get(a.name)) for a in axes] + [losses.at(t.loss or 0.0)]
        points = [f"{10 * x:.1f} {y(s)}" for x, s in zip(places, shares, strict=True) if s is not None]
        d = "M" + "L".join(points)
        shade = _SHADES - 1 - rank * _SHADES // len(measured)
        ways.append(
            element(
                "g",
                element("path", d=d, class_="line", vector_effect="non-scaling-stroke"),
                element("path", d=d, class_="reach", vector_effect="non-scaling-stroke"),
                class_=f"way {'best' if t.best else f'p{shade}'}",
                data_tip=t.tip(names),
            )
        )
    posts: list[Markup] = []
    ends = [
        *((words(a.name), a.labels()) for a in axes),
        ("loss", [(losses.at(v), number(v, 4)) for v in losses.ticks()]),
    ]
    for index, (x, (title, labels)) in enumerate(zip(places, ends, strict=True)):
        anchor = "start" if index == 0 else "end" if index == len(axes) else "middle"
        edge = 0 if index == 0 else 100 if index == len(axes) else x
        posts.append(element("line", x1=pct(x), x2=pct(x), y1=head + 6, y2=height, class_="post"))
        folded = _folded(title)
        for line, part in enumerate(folded):
            y_line = head - 3 - 14 * (len(folded) - 1 - line)
            posts.append(
                element("text", escape(part), x=pct(edge), y=y_line, text_anchor=anchor, class_="label strong")
            )
        side = ("end", -6) if index == len(axes) else ("start", 6)
        for share, text in labels:
            posts.append(element("text", escape(text[:18]), x=pct(x), dx=side[1], y=y(share) + 4, text_anchor=side[0],
                                 class_="label halo"))  # fmt: skip
    return figure(
        key="parallel",
        title="Parallel coordinates",
        description=f"{len(measured)} trials; each one's figures stand in the table of trials.",
        height=height + 6,
        body=[stretch(height, *ways), *posts],
        note="a line a trial; the stronger, the lower its loss",
        legend=[("best trial", "best")],
    )


def fronts(
    measured: Sequence[Mapping[str, Any]], objectives: Sequence[str], trials: Sequence[Trial], *, height: int = 230
) -> list[Markup]:
    """Every measured rung by the first of several objectives, of each of which less is better, over each other one, and
    the rungs that no other beats in all."""
    points = [row for row in measured if all(row[name] is not None for name in objectives)]
    best = next((t for t in trials if t.best), None)
    return [_front(points, objectives, second, best, height) for second in objectives[1:]] if points else []


def _front(
    points: Sequence[Mapping[str, Any]], objectives: Sequence[str], second: str, best: Trial | None, height: int
) -> Markup:
    first, names = objectives[0], [words(name) for name in objectives]
    beyond = [row for row in points if not any(_dominates(other, row, objectives) for other in points)]
    values = [float(row[second]) for row in points]
    low, high = min(values), max(values)
    pad = (high - low) * 0.03 or abs(high) * 0.1 or 1.0
    along = Scale(low=low - pad, high=high + pad)
    scale = _losses([float(row[first]) for row in points])
    grid, labels = _grid(scale, height)
    place = {id(row): (100 * along.at(float(row[second])), _y(scale, float(row[first]), height)) for row in points}
    line = "L".join(f"{10 * x:.1f} {y}" for x, y in sorted(place[id(row)] for row in beyond))
    drawn = element("path", d=f"M{line}", class_="line best", vector_effect="non-scaling-stroke")
    lines = [stretch(height, drawn)] if len(objectives) == 2 else []  # seen from one side, a surface is no line
    dots = []
    for row in sorted(points, key=lambda row: row in beyond):
        x, y = place[id(row)]
        look = "best" if row in beyond else "trial"
        head = f"Trial {row['trial']} after {row['steps']} steps"
        if best is not None and row["trial"] == best.number:
            head += ", the winner" if row in beyond else ", of the winner"
        tip = "\n".join([head, *(f"{words(name)}  {number(float(row[name]), 4)}" for name in objectives)])
        dots.append(element("circle", cx=pct(x), cy=y, r=5 if row in beyond else 4, class_=f"dot {look}", data_tip=tip))
    below = [(100 * along.at(tick), number(tick)) for tick in along.ticks(6)]
    return figure(
        key=f"front-{second}",
        title="Pareto front" if len(objectives) == 2 else f"Pareto front, by {words(second)}",
        description=f"{len(beyond)} of {len(points)} measured rungs are beaten by no other in all of "
        f"{', '.join(names)}.",
        height=height + _AXIS,
        body=[
            *grid,
            *lines, *dots, *labels, *_below(below, height),
        ],
        note=f"{names[0]} over {words(second)}, of each measured rung",
        legend=[("beaten by none", "best"), ("others", "trial")],
        table=rows_table(
            ["Trial", "Steps", *names],
            [[row["trial"], row["steps"], *(number(float(row[n]), 4) for n in objectives)] for row in beyond],
        ),
    )  # fmt: skip


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any], objectives: Sequence[str]) -> bool:
    pairs = [(one[name], other[name]) for name in objectives]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def _folded(title: str, width: int = 11) -> list[str]:
    """A title in short lines, so that neighbours have room."""
    found: list[str] = []
    for word in title.split():
        if found and len(found[-1]) + len(word) < width:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def importances(shares: Mapping[str, float]) -> Markup:
    """How much each parameter decided, the most important first."""
    if not shares:
        return Markup("")
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    most, row, body = ordered[0][1] or 1.0, 34, []
    for index, (name, share) in enumerate(ordered):
        top = index * row
        body += [
            element("text", escape(words(name)), x=0, y=top + 13, class_="label strong"),
            element("text", f"{100 * share:.0f} %", x="100%", y=top + 13, text_anchor="end", class_="label"),
            element("rect", x=0, y=top + 19, width="100%", height=8, rx=4, class_="bar empty"),
            element("rect", x=0, y=top + 19, width=pct(max(0.5, 100 * share / most)), height=8, rx=4, class_="bar c0"),
        ]
    return figure(
        key="importances",
        title="Importances",
        description=f"Of the outcome after the first rung, {words(ordered[0][0])} decided most.",
        height=row * len(shares),
        body=body,
        note="what decided who was among the best third after the first rung",
    )
