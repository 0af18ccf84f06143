"""An evaluation and a policy give a decision: pass, fail, or underpowered, with a sentence for each gate. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from registry.statistics import Estimate, detectable, power_of, rows_for

Outcome = Literal["pass", "fail", "underpowered"]
Must = Literal["not_worse", "better", "at_most", "at_least"]

# How many of the rows to learn from stood in rows that judge: always looked at, in rows, 0 unless a gate allows more.
CONTAMINATION = "contamination"
# A limit on time, rate or money is a limit on the figure itself; see `decide`.
_OPERATIONAL = ("_ms", "_seconds", "_per_second", "_usd")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One line of the policy. `margin` (not negative) and `value` are in the metric's own unit; judged on fewer than
    `min_rows` rows (of a comparison those that both answered) it is underpowered."""

    metric: str
    must: Must
    against: Literal["champion", "base"] | None = None
    margin: float = 0.0
    value: float | None = None
    slice: str | None = None
    min_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`gates` holds each gate with its own decision, reason and the estimate it was judged by. `approvals`: how many
    people other than the `author` must approve of the version before it serves; see registry/approvals.py.
    `evaluation` is the digest of the evidence it was made from, `champion` the version it was judged beside, and
    `champion_bundle` the digest of that one's files, which is the same in every registry."""

    decision: Outcome
    reasons: list[str]
    gates: list[dict[str, Any]] = field(default_factory=list)
    approvals: int = 0
    author: str | None = None
    evaluation: str | None = None
    champion: int | None = None
    champion_bundle: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(
    gates: Sequence[Gate],
    evaluation: Mapping[str, Any],
    *,
    on_underpowered: Literal["refuse", "ask"],
    first: bool,
    required: Mapping[str, Collection[str]] | None = None,
) -> Decision:
    """Judge an evaluation (the JSON of pipelines/evaluation) by a policy; one failed gate fails it all.

    - ``not_worse`` looks at the paired difference, turned so that more is better: pass when the interval's bad end
      lies above ``-margin``, fail when all of it lies at or under ``-margin``, else underpowered.
    - ``better`` likewise with ``+margin`` (0 unless given): pass when the whole interval lies above it, fail when
      all of it lies at or under it, else underpowered.
    - ``at_most`` / ``at_least`` look at the candidate's own value: pass when the whole interval keeps the limit, fail
      when none of it does, else underpowered. Time, rate and money (metrics that end in ``_ms``, ``_seconds``,
      ``_per_second`` or ``_usd``) are judged by the estimate alone: their spread comes from the machine as much as
      from the rows, and the interval of a 95th percentile has no upper end on fewer than 72 rows.
    - Against the champion means against the base for a model's `first` version, and where no champion was measured
      nothing can be compared: fail.
    - A metric that was not measured, or that the evaluation calls unavailable or doubted, fails. A source
      without rows (unless the gate wants some), and a metric of which the evaluation says that there is nothing to
      measure, are said so and do not count. Another slice without rows is underpowered: its name may be misspelt.
    - Each suite of `required` (suite -> its metrics) must have run and measured something, or it fails by name.
    - Contamination (``evaluation["contamination"]``, of pipelines/data/contamination.py) is judged whatever the policy:
      no row may have stood in rows that judge, or no more than a gate ``{metric: contamination, must: at_most}`` says.
      A version that was not trained here has none; of one without an adapter no test row may stand in its prompt.
    - An empty policy passes, but for that.

    What the intervals promise: a candidate that is worse by exactly the margin passes `not_worse` in at most
    (1 - level) / 2 of all evaluations, 2.5 %, and an equal one in the share that the entry's `power` says;
    `detectable` is the margin by which an equal one would pass in 80 %. tests/benchmarks/gates.py holds both to it.

    With `on_underpowered` "ask", the reasons say that a person may decide; the decision is the same.
    """
    judged = [_judge(gate, evaluation, first) for gate in gates if gate.metric != CONTAMINATION]
    judged += [_ran(suite, metrics, evaluation) for suite, metrics in (required or {}).items()]
    if (found := evaluation.get("contamination")) is not None:
        own = [gate for gate in gates if gate.metric == CONTAMINATION]
        judged += [_clean(gate, found) for gate in own or [Gate(metric=CONTAMINATION, must="at_most", value=0)]]
    outcomes = {entry["decision"] for entry in judged}
    decision: Outcome = "fail" if "fail" in outcomes else "underpowered" if "underpowered" in outcomes else "pass"
    reasons = [str(entry["reason"]) for entry in judged]
    if decision == "underpowered" and on_underpowered == "ask":
        reasons.append("There are too few rows to decide: a person may, with `tunesmith promote --force`.")
    return Decision(decision=decision, reasons=reasons, gates=judged)


def _judge(gate: Gate, evaluation: Mapping[str, Any], first: bool) -> dict[str, Any]:
    where = f" on {gate.slice}" if gate.slice else ""
    name = f"{gate.metric}{where}"

    def say(decision: Outcome, reason: str, estimate: Estimate | None = None) -> dict[str, Any]:
        return {
            **asdict(gate),
            "decision": decision,
            "reason": reason,
            "estimate": estimate.to_json() if estimate else None,
        }

    for what in ("unavailable", "doubted"):
        if why := evaluation.get(what, {}).get(gate.metric):
            return say("fail", f"{name}: is {what}, {why}")
    part = evaluation["slices"].get(gate.slice) if gate.slice else evaluation["metrics"]
    if part is None and gate.min_rows:
        return say("underpowered", f"{name}: was measured on 0 rows, must be on {gate.min_rows}")
    if part is None and gate.slice and not gate.slice.startswith("source="):  # may well be misspelt
        return say("underpowered", f"{name}: there are no such rows; is the slice spelt as the rows have it?")
    if part is None:
        return say("pass", f"{name}: no rows, does not count")
    measured = part.get(gate.metric)
    if measured is None and (why := evaluation.get("not_applicable", {}).get(gate.metric)):
        return say("pass", f"{name}: {why}, does not count")
    if measured is None:
        return say("fail", f"{name}: was not measured")
    if gate.must in ("at_most", "at_least"):
        own = Estimate.from_json(measured["candidate"])
        if own.n < gate.min_rows:
            return say("underpowered", f"{name}: was measured on {own.n} rows, must be on {gate.min_rows}")
        return say(*_limit(gate, name, own))
    against = "base" if gate.against is None or first else gate.against
    compared = measured.get(f"vs_{against}")
    if compared is None:
        why = ", which has no such number where it is hosted or stands on another base" if against == "champion" else ""
        return say("fail", f"{name}: was not measured against the {against}{why}")
    estimate = Estimate.from_json(compared)
    if estimate.n < gate.min_rows:
        why = f"{name} against {against}: was compared on {estimate.n} rows, must be on {gate.min_rows}"
        return say("underpowered", why)
    entry = say(*_difference(gate, f"{name} against {against}", estimate))
    if gate.must == "not_worse":
        entry |= {"power": _known(power_of(estimate, gate.margin)), "detectable": _known(detectable(estimate))}
    return entry


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ran(suite: str, metrics: Collection[str], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    entry = {**asdict(Gate(metric=f"suite {suite}", must="at_least", value=1)), "estimate": None}
    measured = [metric for metric in metrics if metric in evaluation["metrics"]]
    if suite not in evaluation.get("suites", ()):
        return {**entry, "decision": "fail", "reason": f"suite {suite}: is required and did not run"}
    if not measured:
        told = {**evaluation.get("not_applicable", {}), **evaluation.get("unavailable", {})}
        why = "; ".join(dict.fromkeys(told[metric] for metric in metrics if metric in told)) or "it says not why"
        return {**entry, "decision": "fail", "reason": f"suite {suite}: is required and measured nothing: {why}"}
    if all(metric in evaluation.get("doubted", {}) for metric in measured):
        why = "; ".join(dict.fromkeys(evaluation["doubted"][metric] for metric in measured))
        return {**entry, "decision": "fail", "reason": f"suite {suite}: is required and not to be trusted: {why}"}
    told = evaluation.get("unavailable", {})
    lacking = [f"{metric} ({told[metric]})" for metric in metrics if metric in told]
    rest = f", but measured not {'; '.join(lacking)}" if lacking else ""
    return {**entry, "decision": "pass", "reason": f"suite {suite}: ran, as required{rest}"}


def _clean(gate: Gate, found: Mapping[str, Any]) -> dict[str, Any]:
    allowed = gate.value or 0
    said = found.get("said", "rows to learn from also stood in rows that judge")
    text = f"{CONTAMINATION}: {found['rows'] or 'none'} of {found['of']} {said}"
    if found.get("unknown"):
        text += f"; what {', '.join(found['unknown'])} learned, from which it began, is not known here"
    if found["rows"]:
        named = [f"{one['row']} {one['how']} in {one['stands_in']}" for one in found["examples"]]
        more = "" if len(named) == found["rows"] else f", and {found['rows'] - len(named)} more"
        text += f", at most {allowed:g} may: {', '.join(named)}{more}"
    decision: Outcome = "pass" if found["rows"] <= allowed else "fail"
    if decision == "fail":
        allowing = f"{{metric: {CONTAMINATION}, must: at_most, value: {found['rows']}}}"
        text += f". Take them out, or allow them with the gate {allowing}"
    return {**asdict(gate), "decision": decision, "reason": text, "estimate": None, **found}


def _difference(gate: Gate, name: str, estimate: Estimate) -> tuple[Outcome, str, Estimate]:
    sign = 1.0 if estimate.higher_is_better else -1.0
    ends = sorted((sign * estimate.low, sign * estimate.high))
    threshold = gate.margin if gate.must == "better" else -gate.margin
    words = gate.must.replace("_", " ") + (f" by more than {gate.margin:g}" if gate.margin else "")
    text = f"{name}: {_show(estimate, signed=True)}, must be {words}"
    if math.isnan(estimate.estimate):
        return "underpowered", f"{text}: not a number", estimate
    if ends[0] > threshold:
        return "pass", text, estimate
    if ends[1] <= threshold:
        return "fail", text, estimate
    # `not_worse`: rows that show an equal candidate; `better`: rows that show a gain of the size seen.
    distance = gate.margin if gate.must == "not_worse" else sign * estimate.estimate - gate.margin
    return "underpowered", f"{text}: too few rows, {_rows(estimate, distance)}", estimate


def _limit(gate: Gate, name: str, estimate: Estimate) -> tuple[Outcome, str, Estimate]:
    sign = 1.0 if gate.must == "at_least" else -1.0
    limit = sign * (gate.value if gate.value is not None else math.nan)
    text = f"{name}: {_show(estimate)}, must be {gate.must.replace('_', ' ')} {gate.value:g}"
    value = sign * estimate.estimate
    if math.isnan(value) or math.isnan(limit):
        return "fail", f"{text}: not a number", estimate
    if gate.metric.endswith(_OPERATIONAL):
        return "pass" if value >= limit else "fail", text, estimate
    ends = sorted((sign * estimate.low, sign * estimate.high))
    if ends[0] >= limit:
        return "pass", text, estimate
    if ends[1] < limit:
        return "fail", text, estimate
    return "underpowered", f"{text}: too few rows, {_rows(estimate, value - limit)}", estimate


def _rows(estimate: Estimate, distance: float) -> str:
    if estimate.least_n is not None:
        return f"there is no interval on fewer than {estimate.least_n}, there are {estimate.n}"
    shown = detectable(estimate)
    if not distance > 0 or not math.isfinite(shown) or estimate.n < 2:
        return f"{estimate.n} of them cannot tell"
    needed = max(rows_for(estimate, distance), estimate.n + 1)
    return f"about {needed} would do (80 % power), there are {estimate.n}, which show {shown:.3g}"


def _show(estimate: Estimate, *, signed: bool = False) -> str:
    form = "+.4g" if signed else ".4g"
    low, high = (format(end, form) if math.isfinite(end) else "unknown" for end in (estimate.low, estimate.high))
    return f"{estimate.estimate:{form}} [{low}, {high}] on {estimate.n} rows"
