"""Alerts: what needs a person now. One open alert for each model, version and rule, however often it is seen.

A rule has two limits: it opens beyond the first and closes only when the figure is back behind the second
(`_CLEAR`), so that a figure at the limit does not flicker. Between them, and without enough requests to tell, an
alert stays as it is.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries, one
from monitoring import figures, windows
from monitoring.attribution import Cause
from monitoring.windows import Window
from registry import notifications

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

Severity = Literal["info", "warning", "critical"]
State = Literal["over", "between", "calm", "unknown"]

RECENT = timedelta(minutes=15)  # what latency and errors are read from; cost is of the model's whole window
_MIN_REQUESTS = 20
_CLEAR = 0.8  # of a limit from above, 1 / _CLEAR of one from below; of a drift threshold, _CLEAR_DRIFT
_CLEAR_DRIFT = 0.9
_SEVERITIES: Sequence[Severity] = ("info", "warning", "critical")
_STATES: Sequence[State] = ("over", "between", "unknown", "calm")  # which of several limits' states decides
_SILENT = timedelta(hours=1)
_GRACE = timedelta(seconds=30)  # that a gateway may take to follow a change
NOT_SERVING = "not serving"
GOLDEN = "golden set"
BUDGET = "budget"
REFUSED = "refused"
_NEARLY = 0.8  # of a budget in dollars
_REFUSED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A limit on a figure, from the model's ``monitoring.alerts``."""

    metric: str
    above: float | None = None
    below: float | None = None
    severity: Severity = "warning"

    def state(self, value: float | None) -> State:
        if value is None:
            return "unknown"
        if self.above is not None:
            return "over" if value > self.above else "calm" if value <= self.above * _CLEAR else "between"
        low = self.below or 0.0
        return "over" if value < low else "calm" if value >= low / _CLEAR else "between"


# A figure that was seen, in words, and what an alert on it is called
_SEEN = {
    "error_rate": "{} of requests failed",
    "cost_usd": "it cost {}",
    "p50_latency_ms": "half of the answers took {} or longer",
    "p95_latency_ms": "one answer in 20 took {} or longer",
    "p99_latency_ms": "one answer in 100 took {} or longer",
    "p95_ttft_ms": "one stream in 20 began after {} or later",
}
_TITLES = {
    "drift": "Requests or answers have changed",
    NOT_SERVING: "A gateway cannot serve what it should",
    GOLDEN: "It answers its own test questions worse",
    BUDGET: "Its budget is used up, or nearly",
    REFUSED: "Requests are refused",
    "error_rate above": "Too many requests fail",
    "cost_usd above": "It costs more than its limit",
    "p50_latency_ms above": "Answers are slow",
    "p95_latency_ms above": "Some answers are slow",
    "p99_latency_ms above": "A few answers are slow",
    "p95_ttft_ms above": "Some answers begin late",
    "error_rate below": "Fewer requests fail than its limit",
    "cost_usd below": "It costs less than its limit",
}
_DRIFTED: Mapping[Cause, str] = {
    "input": "People ask for other things than it was trained on",
    "model": "It answers otherwise than it did",
    "judge": "Its answers are scored lower, though they are as before",
}


def title(rule: str, cause: Cause | None = None) -> str:
    """What an alert is about, in plain words."""
    if rule == "drift" and cause:
        return _DRIFTED.get(cause, _TITLES[rule])
    if rule in _TITLES:
        return _TITLES[rule]
    metric, _, side = rule.partition(" ")
    return "Answers come sooner than its limit" if metric in _SEEN and side == "below" else figures.words(rule)


def said(alert: Mapping[str, Any], advice: Sequence[str] = ()) -> str:
    """An alert's message without what a page says elsewhere: whose it is, before it, and what to do, at its end."""
    text: str = alert["message"].removeprefix(f"{alert['model']}:{alert['version']}: ")
    for each in advice:
        text = text.removesuffix(each).rstrip()
    return text[:1].upper() + text[1:]


DEFAULTS = (
    Rule(metric="error_rate", above=0.05, severity="critical"),
    Rule(metric="p95_latency_ms", above=30_000),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look at one rule gave; `cause` and `began_at` where the look itself tells."""

    rule: str
    state: State
    severity: Severity = "warning"
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    cause: Cause | None = None
    began_at: datetime | None = None


def rules_of(settings: Mapping[str, Any]) -> list[Rule]:
    """The rules of a model's settings, over the defaults of the metrics it does not name."""
    own = [
        Rule(**{k: v for k, v in r.items() if k in Rule.__dataclass_fields__})
        for r in settings.get("monitoring", {}).get("alerts", ())
    ]
    return own + [rule for rule in DEFAULTS if rule.metric not in {r.metric for r in own}]


def figure(window: Window, metric: str) -> float | None:
    """A rule's figure of a window; None when too few requests tell."""
    if metric == "cost_usd":
        return window.cost_usd
    if window.requests < _MIN_REQUESTS:
        return None
    if metric == "error_rate":
        return window.errors / window.requests
    quantile, _, what = metric.partition("_")
    counts = window.ttft_ms if what == "ttft_ms" else window.latency_ms
    if sum(counts.values()) < _MIN_REQUESTS:
        return None
    return windows.percentile(counts, int(quantile.removeprefix("p")) / 100)


def look(
    conn: Connection, model: str, version: int, settings: Mapping[str, Any], now: datetime, span: timedelta
) -> list[Finding]:
    """What the model's rules say of a version's traffic up to `now`, one finding for all limits of a figure on one
    side; `span` is the model's window."""
    recent = windows.read(conn, model, version, now - RECENT, now)
    findings: dict[str, Finding] = {}
    for rule in rules_of(settings):
        window = windows.read(conn, model, version, now - span, now) if rule.metric == "cost_usd" else recent
        value = figure(window, rule.metric)
        limit = rule.above if rule.above is not None else rule.below
        side = "above" if rule.above is not None else "below"
        over = span if rule.metric == "cost_usd" else RECENT
        finding = Finding(
            rule=f"{rule.metric} {side}",
            state=rule.state(value),
            severity=rule.severity,
            message=f"{model}:{version}: {_SEEN[rule.metric].format(in_words(rule.metric, value))}, {side} the limit "
            f"of {in_words(rule.metric, limit)} ({window.requests} requests of the last {_minutes(over)}).",
            details={"value": value, "limit": limit, "requests": window.requests, "seconds": over.total_seconds()},
        )
        findings[finding.rule] = min(findings.get(finding.rule, finding), finding, key=_order)
    return list(findings.values())


def _order(finding: Finding) -> tuple[int, int]:
    return _STATES.index(finding.state), -_SEVERITIES.index(finding.severity)


def look_at_refusals(conn: Connection, model: str, version: int, now: datetime) -> list[Finding]:
    """Whether a model's clients are turned away, or will be soon: its budgets in dollars, and what was refused for want
    of budget or room, which is no version's traffic and stands in no window."""
    spent = max(conn.execute(SQL["budgets"], {"model": model}), key=lambda row: float(row["share"]), default=None)
    share = float(spent["share"]) if spent else 0.0
    state: State = "over" if share >= _NEARLY else "calm"
    text = ""
    if spent:
        span = "day" if spent["kind"] == "usd" else "month"
        what = f"{figures.usd(spent['used'])} of {figures.usd(spent['amount'])} a {span}"
        text = f"{model}:{version}: {what} are used" + (
            f" up: clients are answered 429 until the next {span} begins (UTC)."
            if share >= 1
            else f", {figures.percent(share)}."
        )
    budget = Finding(
        rule=BUDGET, state=state, severity="critical" if share >= 1 else "warning", message=text,
        details={"share": figures.percent(share)},
    )  # fmt: skip
    row = one(conn, SQL["refused"], {"model": model, "since": now - RECENT, "until": now})
    refused, answered = int(row["refused"]), int(row["answered"])
    share = refused / max(1, refused + answered)
    state = (
        "unknown" if refused + answered < _MIN_REQUESTS else "calm" if share <= _REFUSED_SHARE * _CLEAR else "between"
    )
    if refused >= _MIN_REQUESTS and share > _REFUSED_SHARE:
        state = "over"
    return [
        budget,
        Finding(
            rule=REFUSED, state=state, details={"refused": refused, "answered": answered},
            message=f"{model}:{version}: {refused} of {refused + answered} requests of the last {_minutes(RECENT)} "
            f"were refused, most of them so: {figures.short(row['why'] or 'no reason is known').removesuffix('.')}.",
        ),
    ]  # fmt: skip


def look_at_gateways(conn: Connection, since: dict[str, tuple[int, datetime]], now: datetime) -> None:
    """An alert for each model whose deployment a gateway could not follow for a while: it serves what it has. `since`
    is the caller's memory from one look to the next: since when, of which generation."""
    for row in conn.execute(SQL["gateways"]).fetchall():
        model, behind = row["model"], row["behind"]
        if not behind:
            since.pop(model, None)
        elif since.get(model, (-1, now))[0] != row["generation"]:
            since[model] = row["generation"], now
        long = behind and now - since[model][1] >= _GRACE
        state: State = "over" if long else "between" if behind else "calm" if row["gateways"] else "unknown"
        finding = Finding(
            rule=NOT_SERVING,
            state=state,
            message=f"{behind} of {row['gateways']} gateways could not follow the last change of {model} (generation "
            f"{row['generation']}) for {_GRACE.total_seconds():.0f} s, and serve what they have: "
            f"{figures.short(row['why'] or 'no reason is known').removesuffix('.')}.",
            details={
                "generation": row["generation"],
                "gateways": row["gateways"],
                "behind": behind,
                "why": row["why"],
            },
            cause="system",
            began_at=since[model][1] if behind else None,
        )
        apply(conn, model, row["version"], [finding])


def of_verdict(body: Mapping[str, Any]) -> Finding:
    """What a drift verdict means for its alert: `calm` only when every feature is well under its threshold."""
    found = body["attribution"]
    highest = max((f["value"] / f["threshold"] for f in body["features"]), default=0.0)
    state: State = (
        "unknown"
        if body["verdict"] == "too_few"
        else "over"
        if body["verdict"] == "drift"
        else "calm"
        if highest < _CLEAR_DRIFT
        else "between"
    )
    return Finding(
        rule="drift",
        state=state,
        message=str(body["explanation"]),
        details={
            "features": [
                {name: f[name] for name in ("name", "statistic", "value", "threshold")}
                for f in body["features"]
                if f["drifted"]
            ],
            "examples": found["requests"] if found else [],
        },
        cause=found["cause"] if found else None,
        began_at=datetime.fromisoformat(found["since"]) if found and found["since"] else None,
    )


Explain = Callable[[Connection, Mapping[str, Any]], tuple[Cause | None, datetime | None]]


def apply(
    conn: Connection, model: str, version: int, findings: Sequence[Finding], explain: Explain | None = None
) -> None:
    """Open, confirm or close the alerts that the findings are about. `explain` is asked what an alert comes of, and
    since when, where the finding does not say: once a minute in its first minutes, since more of it comes, and for an
    hour until it is known. Its last word counts; that it knows nothing, or fails, changes nothing."""
    for finding in findings:
        key = {"model": model, "version": version, "rule": finding.rule}
        if finding.state == "over":
            row = one(
                conn,
                SQL["raise"],
                {
                    **key,
                    "id": uuid.uuid4(),
                    "severity": finding.severity,
                    "severities": list(_SEVERITIES),
                    "silenced": silenced(conn, model, finding.rule),
                    "message": finding.message,
                    "details": Jsonb(dict(finding.details)),
                    "cause": finding.cause,
                    "began_at": finding.began_at,
                },
            )
            if finding.cause is None and explain is not None and row["to_explain"]:
                row = {**row, **_explained(conn, key | row, explain)}
            if row["opened"]:
                log.warning("alert: %s", finding.message)
            _tell_open(conn, key | row | {"message": finding.message})
        elif finding.state == "between":  # there is traffic, and it does not say that it is over
            conn.execute(SQL["seen"], key)
        elif finding.state == "calm" and (over := conn.execute(SQL["close"], key).fetchone()):
            log.info("alert over: %s of %s:%d", finding.rule, model, version)
            _tell_over(conn, key | over)
        elif (
            finding.state == "unknown"
            and finding.rule != "drift"
            and (over := conn.execute(SQL["close_silent"], {**key, "seconds": _SILENT.total_seconds()}).fetchone())
        ):
            log.info("alert closed for want of traffic: %s of %s:%d", finding.rule, model, version)
            _tell_over(conn, key | over)


def _explained(conn: Connection, alert: Mapping[str, Any], explain: Explain) -> Mapping[str, Any]:
    cause, began_at = None, None
    try:
        with conn.transaction():  # an alert opens whatever becomes of this
            cause, began_at = explain(conn, alert)
    except Exception:
        log.exception("what %s of %s comes of was not found", alert["rule"], alert["model"])
    return one(conn, SQL["explain"], {"id": alert["id"], "cause": cause, "began_at": began_at})


def _tell_open(conn: Connection, alert: Mapping[str, Any]) -> None:
    """Tell of an open alert once, and again when it is worse; what is silenced later, mere information never."""
    if alert["told_at"] is None and alert["severity"] != "info" and not silenced(conn, alert["model"], alert["rule"]):
        _tell(conn, "opened", alert)
        conn.execute(SQL["told"], {"id": alert["id"]})


def _tell_over(conn: Connection, alert: Mapping[str, Any]) -> None:
    """Tell that an alert is over to those who were told that it opened, silenced or not: they wait for it."""
    if alert["told_at"] is not None:
        _tell(conn, "closed", alert)


def _tell(conn: Connection, what: Literal["opened", "closed"], alert: Mapping[str, Any]) -> None:
    names = ("model", "version", "rule", "severity", "message", "cause", "began_at", "opened_at", "closed_at")
    data = {name: alert.get(name) for name in names} | {
        "title": title(alert["rule"], alert.get("cause")),
        "url": notifications.page(f"/alerts/{alert['id']}"),
    }
    body = {"type": f"alert.{what}", "timestamp": alert["closed_at" if what == "closed" else "opened_at"], "data": data}
    notifications.enqueue(conn, alert["model"], f"alert-{alert['id']}-{what}-{alert['severity']}", body)


def silence(conn: Connection, model: str, rule: str | None, span: timedelta, *, actor: str, reason: str) -> datetime:
    """Tell nobody of a model's alerts, or of one rule's, for a while; until when."""
    values = {"model": model, "rule": rule, "seconds": span.total_seconds(), "actor": actor, "reason": reason}
    until: datetime = one(conn, SQL["silence"], values)["until"]
    return until


def unsilence(conn: Connection, model: str, rule: str | None = None) -> int:
    """Tell of them again, or of one rule's; how many silences that ended."""
    return conn.execute(SQL["unsilence"], {"model": model, "rule": rule}).rowcount


def silenced(conn: Connection, model: str, rule: str) -> bool:
    """Whether nobody is told of a rule now."""
    return bool(one(conn, SQL["silenced"], {"model": model, "rule": rule})["yes"])


def silences(conn: Connection) -> list[Mapping[str, Any]]:
    """Those in force, what ends first before the rest."""
    return list(conn.execute(SQL["silences"]))


def rule_names(settings: Mapping[str, Any]) -> list[str]:
    """The rules that a model has, as its alerts name them."""
    own = [f"{r.metric} {'above' if r.above is not None else 'below'}" for r in rules_of(settings)]
    return ["drift", NOT_SERVING, GOLDEN, BUDGET, REFUSED, *own]


def rules_known(conn: Connection, model: str) -> list[str]:
    """The same of a model by its name."""
    return rule_names(one(conn, SQL["settings"], {"model": model})["settings"] or {})


def close_retired(conn: Connection, model: str, versions: Sequence[int], settings: Mapping[str, Any]) -> None:
    """Close the alerts of versions that serve no more, and of rules that are gone from the settings."""
    rules = rule_names(settings)
    for row in conn.execute(SQL["close_retired"], {"model": model, "versions": list(versions), "rules": rules}):
        log.info("alert over: %s of %s:%d, which serves no more", row["rule"], model, row["version"])
        _tell_over(conn, {"model": model, **row})


def listing(conn: Connection, model: str | None = None, *, closed: bool = False) -> list[Mapping[str, Any]]:
    """Open alerts, newest first; with `closed`, after them those closed within thirty days."""
    return list(conn.execute(SQL["list"], {"model": model, "all": closed}))


def open_since(conn: Connection, model: str, version: int, rule: str) -> datetime | None:
    """Since when an alert is open; None when it is not."""
    row = conn.execute(SQL["opened_at"], {"model": model, "version": version, "rule": rule}).fetchone()
    return row["opened_at"] if row else None


def drop_old(conn: Connection, days: int) -> None:
    """Forget alerts that were over `days` ago."""
    conn.execute(SQL["drop_old"], {"days": days})


def in_words(metric: str, value: float | None) -> str:
    """A rule's figure with its unit."""
    write = {"cost_usd": figures.usd, "error_rate": figures.percent}.get(metric, figures.milliseconds)
    return write(value)


def _minutes(span: timedelta) -> str:
    minutes = round(span.total_seconds() / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:g} hours"
