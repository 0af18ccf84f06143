"""An evaluation and its gate as one page that a product owner can read: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.evaluation.catalogue import METRICS, Metric

_VERDICTS = {
    "pass": ("good", "Passes its gates"),
    "fail": ("bad", "Does not pass its gates"),
    "underpowered": ("unsure", "Too few rows to decide"),
}
_OTHERS = {"base": "Base", "champion": "Serving now", "hosted": "Hosted"}
_SAID = {"pass": "holds", "fail": "does not hold", "underpowered": "cannot be told"}


def render(model: str, evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """The HTML page. `evaluation` as `suites.evaluate` gives it, `decision` as ``gates.Decision.to_json``."""
    kind, verdict = _VERDICTS[decision["decision"]]
    about = evaluation.get("about", {})
    beside = {metric: text for part in about.values() for metric, text in part.get("beside", {}).items()}
    doubted = evaluation.get("doubted", {})
    parts = [
        {"name": "All rows", "rows": evaluation["rows"], "metrics": _table(evaluation["metrics"], beside, doubted)}
    ]
    for name, measured in evaluation["slices"].items() if len(evaluation["slices"]) > 1 else ():
        rows = next(iter(measured.values()))["candidate"]["n"]
        title = {"source=train": "Rows of the team's files", "source=feedback": "Corrections that people sent"}
        parts.append({"name": title.get(name, name), "rows": rows, "metrics": _table(measured, beside, doubted)})
    page: str = _template().render(
        model=model,
        kind=kind,
        verdict=verdict,
        gates=[
            {"reason": gate["reason"], "kind": _VERDICTS[gate["decision"]][0], "said": _SAID[gate["decision"]]}
            for gate in decision["gates"]
        ],
        parts=parts,
        others=[who for who in _OTHERS if any(m.get(who) for m in evaluation["metrics"].values())],
        names={"candidate": "New version", **_OTHERS},
        evaluation=evaluation,
        unavailable=[(METRICS[name].title, why) for name, why in evaluation.get("unavailable", {}).items()],
        notes=[note for part in about.values() for note in part.get("notes", [])],
        not_applicable=[(METRICS[name].title, why) for name, why in evaluation.get("not_applicable", {}).items()],
        scorers=[(name, scorer) for part in about.values() for name, scorer in part.get("scorers", {}).items()],
        lost=about.get("compatibility", {}).get("lost", []),
    )
    return page


def _table(measured: Mapping[str, Any], beside: Mapping[str, str], doubted: Mapping[str, str]) -> list[dict[str, Any]]:
    lines = []
    for name, values in measured.items():
        about = METRICS.get(name) or Metric(title=name, unit="", form="{:.4g}")
        lines.append(
            {
                "title": about.title,
                "unit": about.unit,
                "better": "more is better" if values["candidate"]["higher_is_better"] else "less is better",
                "beside": beside.get(name),
                "doubted": name in doubted,
                "values": {who: _value(values.get(who), about.form) for who in ("candidate", *_OTHERS)},
                "differences": {who: _difference(values.get(f"vs_{who}"), about.form) for who in _OTHERS},
            }
        )
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
    known = low is not None and high is not None
    ends = sorted((sign * low, sign * high)) if known else [sign * value, sign * value]
    reach = max(abs(ends[0]), abs(ends[1]), 1e-12) * 1.15
    effect = "better" if known and ends[0] > 0 else "worse" if known and ends[1] < 0 else "not shown"
    return {
        "estimate": _show(value, signed),
        "interval": _interval(estimate, signed),
        "effect": effect,
        "kind": {"better": "good", "worse": "bad"}.get(effect, "unsure"),
        "left": 50 + 50 * ends[0] / reach,
        "width": max(1.0, 50 * (ends[1] - ends[0]) / reach),
        "at": 50 + 50 * sign * value / reach,
    }


def _interval(estimate: Mapping[str, Any], form: str) -> str:
    return f"{_show(estimate['low'], form)} to {_show(estimate['high'], form)}"


def _show(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
