"""Charts of a search: well-formed, in scale, and calm about what is missing or far off."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from monitoring.console import plots
from monitoring.console.plots import Scale, Trial

HOSTILE = '"><script>alert(1)</script>'


def parse(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{markup}</div>")  # noqa: S314 - our own drawing


def trial(number: int, *losses: float, **params: object) -> Trial:
    return Trial(number=number, params=params, course=[(6 * 3**rung, loss) for rung, loss in enumerate(losses)])


def dots(drawn: ElementTree.Element) -> list[tuple[float, float]]:
    """(x in percent, y in pixels) of each, in the order they are drawn."""
    return [
        (float(str(c.get("cx")).removesuffix("%")), float(str(c.get("cy"))))
        for c in drawn.iter("circle")
        if "dot" in str(c.get("class"))
    ]


def test_the_history_goes_down_only_where_a_trial_was_better() -> None:
    drawn = parse(plots.history([trial(2, 2.0), trial(0, 3.0, 2.5), trial(1, 2.7), trial(5, 1.0)]))
    line = next(p for p in drawn.iter("path") if p.get("class") == "line best")
    assert str(line.get("d")).count("V") == 2  # trials 2 and 5 are better than all before, trial 1 is not
    rows = [[cell.text for cell in row] for row in drawn.iter("tr")][1:]
    assert rows == [["0", "2.5", "2.5"], ["1", "2.7", "2.5"], ["2", "2", "2"], ["5", "1", "1"]]
    assert [x for x, _ in dots(drawn)] == [12.5, 37.5, 62.5, 87.5]
    heights = [y for _, y in dots(drawn)]
    assert sorted(heights) == [heights[1], heights[0], heights[2], heights[3]]  # the lower the loss, the lower


def test_a_failed_trial_is_a_cross_with_its_words_and_no_dot() -> None:
    failed = Trial(number=1, params={"r": 4}, failed=True)
    drawn = parse(plots.history([trial(0, 3.0, r=8), failed]))
    assert len(dots(drawn)) == 1
    crosses = [t for t in drawn.iter("text") if t.get("class") == "cross"]
    assert [t.get("data-tip") for t in crosses] == ["Trial 1, failed r  4"]


def test_one_that_is_far_off_does_not_press_the_others_together() -> None:
    near = [trial(n, 2.0 + n / 100) for n in range(8)]
    calm = [y for _, y in dots(parse(plots.history(near)))]
    drawn = parse(plots.history([*near, trial(8, 900.0)]))
    *rest, far = [y for _, y in dots(drawn)]
    assert max(rest) - min(rest) > 0.2 * (max(calm) - min(calm))
    assert far < min(rest)  # at the upper edge, and its tip says where it really is
    assert any("loss 900" in str(c.get("data-tip")) for c in drawn.iter("circle"))


def test_nothing_measured_is_nothing_drawn() -> None:
    unborn = [Trial(number=0, params={"r": 4}), Trial(number=1, params={"r": 8})]
    assert plots.history(unborn) == plots.courses(unborn, [6, 18]) == plots.parallel(unborn) == ""
    assert plots.slices(unborn) == []
    assert plots.slices([trial(0, 2.0, r=4), trial(1, 2.0, r=4)]) == []  # one loss, no parameter that varies
    assert plots.importances({}) == ""
    assert plots.history([]) == ""


def test_a_course_goes_through_its_rungs() -> None:
    best = Trial(number=0, params={}, course=[(6, 3.0), (18, 2.0), (54, 2.5)], best=True)
    drawn = parse(plots.courses([best, trial(1, 3.1)], [6, 18, 54]))
    line = next(p for p in drawn.iter("path") if p.get("class") == "line best")
    points = [tuple(map(float, part.split())) for part in str(line.get("d"))[1:].split("L")]
    first, second, third = (x for x, _ in points)
    assert third == 1000
    assert second - first == pytest.approx(third - second, abs=0.2)  # as far apart, since each is three times the last
    assert points[1][1] > points[2][1] > points[0][1]


@pytest.mark.parametrize(
    ("values", "log", "ends"),
    [
        ([1e-4, 1e-3, 1e-2, 2e-3, 3e-3], True, {1e-4: 0.0, 1e-3: 0.5, 1e-2: 1.0}),
        ([0.0, 0.1, 0.2, 0.3, 0.4], False, {0.0: 0.0, 0.2: 0.5, 0.4: 1.0}),
        ([16, 4, 8], False, {4: 1 / 6, 8: 0.5, 16: 5 / 6}),
        (["linear", "cosine", None], False, {"cosine": 0.25, "linear": 0.75, None: None, "other": None}),
        ([["q_proj"], "attention", ["q_proj"]], False, {"attention": 0.25}),
        ([True, False], False, {False: 0.25, True: 0.75}),
    ],
)
def test_an_axis_has_a_place_for_each_value(values: list[object], log: bool, ends: dict[object, float | None]) -> None:
    axis = plots.axis("p", values, log=log)
    for value, place in ends.items():
        assert axis.at(value) == (None if place is None else pytest.approx(place))
    assert all(0 <= place <= 1 and text for place, text in axis.labels())


def test_a_trial_without_a_parameter_has_no_dot_there_and_still_a_line() -> None:
    trials = [trial(0, 2.0, r=4, use_dora=True), trial(1, 2.5, r=8, use_dora=False), trial(2, 3.0, r=16)]
    by_r, by_dora = (parse(chart) for chart in plots.slices(trials))
    assert [len(dots(by_r)), len(dots(by_dora))] == [3, 2]
    drawn = parse(plots.parallel(trials))
    ways = [next(iter(g)) for g in drawn.iter("g") if str(g.get("class")).startswith("way")]
    assert sorted(str(way.get("d")).count("L") for way in ways) == [1, 2, 2]


def test_the_front_is_what_no_other_beats_in_all() -> None:
    measured = [
        {"trial": n, "steps": 6, "loss": loss, "adapter_parameters": size}
        for n, loss, size in ((0, 2.0, 10), (1, 1.0, 30), (2, 1.5, 20), (3, 1.5, 25), (4, 2.5, 40), (5, 9.0, None))
    ]
    [front] = plots.fronts(measured, ["loss", "adapter_parameters"], [trial(1, 1.0)])
    drawn = parse(front)
    assert [[cell.text for cell in row] for row in drawn.iter("tr")][1:] == [
        ["0", "6", "2", "10"], ["1", "6", "1", "30"], ["2", "6", "1.5", "20"]
    ]  # fmt: skip
    looks = [str(c.get("class")) for c in drawn.iter("circle")]
    assert (looks.count("dot best"), looks.count("dot trial")) == (3, 2)  # nothing is known of the sixth
    assert plots.fronts(measured, ["loss"], []) == plots.fronts([], ["loss", "adapter_parameters"], []) == []


def test_each_further_objective_has_a_picture_of_the_same_front() -> None:
    rows = [
        {"trial": n, "steps": 6, "loss": loss, "adapter_parameters": size, "latency_ms": latency}
        for n, loss, size, latency in ((0, 2.0, 10, 5.0), (1, 1.0, 30, 6.0), (2, 2.5, 20, 4.0), (3, 2.6, 30, 6.0))
    ]
    drawn = plots.fronts(rows, ["loss", "adapter_parameters", "latency_ms"], [trial(1, 1.0)])
    tables = [[next(cell.text for cell in row) for row in parse(each).iter("tr")][1:] for each in drawn]
    assert tables == [["0", "1", "2"], ["0", "1", "2"]]  # 2 is the fastest, though beaten in loss and size
    titles = [each.split("Pareto front, by ")[1].partition("<")[0] for each in drawn]
    assert titles == ["adapter parameters", "latency ms"]


def test_names_and_values_from_outside_are_only_text() -> None:
    trials = [trial(0, 2.0, **{HOSTILE: HOSTILE}), trial(1, 3.0, **{HOSTILE: "b"})]
    charts = [plots.parallel(trials), *plots.slices(trials), plots.history(trials), plots.importances({HOSTILE: 1.0})]
    for chart in charts:
        drawn = parse(chart)
        assert not list(drawn.iter("script"))
        assert not [e for e in drawn.iter() if "style" in e.attrib or any(a.startswith("on") for a in e.attrib)]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(low=5.31, high=5.49), [5.35, 5.4, 5.45]),
        (Scale(low=1e-4, high=1e-2, log=True), [1e-4, 1e-3, 1e-2]),
        (Scale(low=2e-3, high=9e-3, log=True), [2e-3, 9e-3]),
        (Scale(low=2.0, high=2.0), [2.0]),
    ],
)
def test_ticks_are_round_and_inside(scale: Scale, expected: list[float]) -> None:
    assert scale.ticks() == pytest.approx(expected)
