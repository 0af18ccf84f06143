"""An evaluation and its gate as one page that a product owner can read: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.evaluation import agreement, power
from pipelines.evaluation.catalogue import LENGTHS, METRICS, Metric, suite_of

_VERDICTS = {
    "pass": ("good", "Passes its gates"),
    "fail": ("bad", "Does not pass its gates"),
    "underpowered": ("unsure", "Too few rows to decide"),
}
_OTHERS = {"base": "Base", "champion": "Serving now", "hosted": "Hosted"}
HEADLINES = ("label_accuracy", "chrf", "loss")
_SOURCES = {"train": "Rows of the team's files", "feedback": "Corrections that people sent"}
_DIVIDED = {
    "source": "where they come from",
    "label": "the most frequent ones",
    "language": "of the question, guessed by script and common words",
    "length": "characters of the question",
}
_ORDER = ("source=train", "source=feedback", *(f"length={length}" for length in LENGTHS))
_LABELS = 20
_COSTS = ("questions_per_character", "questions_per_word", "answers_per_character", "answers_per_word")
_SAID = {"pass": "holds", "fail": "does not hold", "underpowered": "cannot be told"}


def render(model: str, evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """The HTML page. `evaluation` as `judgement.evaluate` gives it, `decision` as ``gates.Decision.to_json``."""
    kind, verdict = _VERDICTS[decision["decision"]]
    about = evaluation.get("about", {})
    beside = {metric: text for each in about.values() for metric, text in each.get("beside", {}).items()}
    labels = sorted(about.get("quality", {}).get("labels", []), key=lambda line: line["candidate"]["estimate"] or 0.0)
    whole = _table(evaluation["metrics"], beside)
    page: str = _template().render(
        model=model,
        kind=kind,
        verdict=verdict,
        gates=[
            {"reason": gate["reason"], "kind": _VERDICTS[gate["decision"]][0], "said": _SAID[gate["decision"]]}
            for gate in decision["gates"]
        ],
        parts=[
            {"name": "All rows", "what": "Metric", "rows": f"{evaluation['rows']} rows", "metrics": whole},
            *_slices(evaluation),
        ],
        unsure=[
            (who, sum(line["differences"][who] is not None for line in whole), few)
            for who in reversed(_OTHERS)
            if (few := [line for line in whole if (line["differences"][who] or {}).get("rows")])
        ],
        others=[who for who in _OTHERS if any(m.get(who) for m in evaluation["metrics"].values())],
        names=_OTHERS,
        evaluation=evaluation,
        labels=[
            {
                "label": line["label"],
                "rows": line["rows"],
                "values": {who: _value(line.get(who), "{:.2f}") for who in ("candidate", *_OTHERS)},
            }
            for line in labels[:_LABELS]
        ],
        labels_left_out=about.get("quality", {}).get("labels_left_out", 0) + len(labels[_LABELS:]),
        variants=[line | _cells(line, ("likeness",)) for line in about.get("consistency", {}).get("variants", [])],
        languages=[line | _cells(line, _COSTS) for line in about.get("language_cost", {}).get("languages", [])],
        unavailable=_named(evaluation.get("unavailable", {})),
        not_applicable=_named(evaluation.get("not_applicable", {})),
        notes=[note for each in about.values() for note in each.get("notes", [])],
        scorers=[
            (name, scorer | {"in_words": agreement.in_words(scorer)})
            for each in about.values()
            for name, scorer in each.get("scorers", {}).items()
        ],
        lost=about.get("compatibility", {}).get("lost", []),
    )
    return page


def _slices(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each way to divide the rows, by the metric that says most of an answer; with two parts at least."""
    kinds: dict[str, list[str]] = {}
    for name in evaluation["slices"]:
        kinds.setdefault(name.partition("=")[0], []).append(name)
    parts = []
    for kind in _DIVIDED:
        if len(names := kinds.get(kind, [])) < 2:
            continue
        lines = []
        for name in sorted(names, key=lambda name: [*_ORDER, name].index(name)):
            measured = evaluation["slices"][name]
            metric = next((m for m in HEADLINES if m in measured), None)
            if metric is not None:
                value = name.partition("=")[2]
                title = _SOURCES.get(value, value) if kind == "source" else value
                rows = measured[metric]["candidate"]["n"]
                [line] = _table({metric: measured[metric]}, {})
                lines.append(
                    {
                        **line,
                        "suite": None,
                        "title": title,
                        "unit": f"{line['title']}, {rows} {'row' if rows == 1 else 'rows'}",
                        "better": "",
                    }
                )
        parts.append({"name": f"By {kind}", "what": kind.capitalize(), "rows": _DIVIDED[kind], "metrics": lines})
    return parts


def _named(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(METRICS[name].title if name in METRICS else name, why) for name, why in reasons.items()]


def _cells(line: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: _value(line[name], "{:.2f}") for name in names}


def _table(measured: Mapping[str, Any], beside: Mapping[str, str]) -> list[dict[str, Any]]:
    lines = []
    last = None
    # In the catalogue's order, since JSON that was stored has none
    for name, values in sorted(measured.items(), key=lambda item: [*METRICS, item[0]].index(item[0])):
        suite = suite_of(name) if name in METRICS else None
        about = METRICS.get(name) or Metric(title=name, unit="", form="{:.4g}")
        lines.append(
            {
                "suite": suite.replace("_", " ").capitalize() if suite and suite != last else None,
                "title": about.title,
                "unit": about.unit,
                "better": "more is better" if values["candidate"]["higher_is_better"] else "less is better",
                "beside": beside.get(name),
                "values": {who: _value(values.get(who), about.form) for who in ("candidate", *_OTHERS)},
                "differences": {who: _difference(values.get(f"vs_{who}"), about.form) for who in _OTHERS},
            }
        )
        last = suite
    return lines


def _value(estimate: Mapping[str, Any] | None, form: str) -> dict[str, str] | None:
    if estimate is None:
        return None
    return {"estimate": _show(estimate["estimate"], form), "interval": _interval(estimate, form)}


def _difference(estimate: Mapping[str, Any] | None, form: str) -> dict[str, Any] | None:
    """The difference in words and as a bar: 100 units wide, no difference in the middle, gains to the right."""
    if estimate is None or estimate["estimate"] is None:
        return None
    sign = 1.0 if estimate["higher_is_better"] else -1.0
    signed = form.replace(":", ":+", 1)
    value, low, high = estimate["estimate"], estimate["low"], estimate["high"]
    ends = sorted((sign * low, sign * high)) if low is not None and high is not None else [sign * value, sign * value]
    reach = max(abs(ends[0]), abs(ends[1]), 1e-12) * 1.15
    told = power.of(estimate)
    return {
        "estimate": _show(value, signed),
        "interval": _interval(estimate, signed) + _exact(estimate),
        "effect": told.effect,
        "rows": told.rows,
        "n": estimate["n"],
        "power": power.in_words(told, form),
        "kind": {"better": "good", "worse": "bad"}.get(told.effect, "unsure"),
        "left": 50 + 50 * ends[0] / reach,
        "width": max(1.0, 50 * (ends[1] - ends[0]) / reach),
        "at": 50 + 50 * sign * value / reach,
    }


def _exact(estimate: Mapping[str, Any]) -> str:
    p = estimate.get("p_value")
    return "" if p is None else ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"


def _interval(estimate: Mapping[str, Any], form: str) -> str:
    if estimate["low"] is None and estimate["high"] is None:
        return "no interval"
    return f"{_show(estimate['low'], form)} to {_show(estimate['high'], form)}"


def _show(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
