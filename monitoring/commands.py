"""Commands that say what happened: traffic, drift, cost, alerts, and a candidate beside the champion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from infra.console import err, json_option, out, print_json, safe

if TYPE_CHECKING:
    from infra.db import Connection

F = TypeVar("F", bound=Callable[..., Any])


def _span_options(function: F) -> F:
    function = click.option("--until", help="A time (RFC 3339); by default now.")(function)
    return click.option(
        "--since", default="24h", show_default=True, help="A duration before --until, or a time (RFC 3339)."
    )(function)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a command is about: a model, a version of it, and a time."""

    model: str
    version: int
    by_number: bool
    since: datetime
    until: datetime
    slots: Mapping[int, str]

    def versions(self, conn: Connection) -> list[int]:
        """The version that was named, or all that serve or served something in the time."""
        from monitoring import drift

        if self.by_number:
            return [self.version]
        return sorted({*self.slots, *drift.versions_with_traffic(conn, self.model, self.since, self.until)})


def _asked(conn: Connection, ref: str, since: str, until: str | None) -> _Asked:
    from infra.errors import NotFound
    from registry import deployments, versions
    from registry.names import parse_ref

    wanted = parse_ref(ref)
    begin, end = _span(since, until)
    deployment = deployments.read(conn, wanted.model)
    if wanted.number is not None:
        versions.get(conn, wanted.model, wanted.number)
    slots = {number: slot for slot in ("shadow", "challenger", "champion") if (number := getattr(deployment, slot))}
    number = wanted.number or getattr(deployment, wanted.slot)
    if number is None:
        raise NotFound(
            f"The model {wanted.model} has no {wanted.slot}.", hint=f"Name a version, such as {wanted.model}:1."
        )
    return _Asked(
        model=wanted.model,
        version=number,
        by_number=wanted.number is not None,
        since=begin,
        until=end,
        slots=slots,
    )


def _span(since: str, until: str | None) -> tuple[datetime, datetime]:
    from infra.durations import parse_time
    from infra.errors import UsageError

    end = parse_time("--until", until) if until else datetime.now(UTC)
    begin = parse_time("--since", since, before=end)
    if begin >= end:
        raise UsageError("--since is not before --until.")
    return begin, end


@click.command()
@click.argument("ref", metavar="MODEL[:N]")
@_span_options
@json_option
def monitor(ref: str, since: str, until: str | None, as_json: bool) -> None:
    """Requests, errors, latency, tokens and cost; without :N of the champion, with each version listed."""
    from infra.db import transaction
    from monitoring import feedback, latency, windows

    with transaction() as conn:
        asked = _asked(conn, ref, since, until)
        versions = [
            {
                "version": v,
                "slot": asked.slots.get(v),
                **latency.summary(windows.read(conn, asked.model, v, asked.since, asked.until)),
                "feedback": dict(feedback.summary(conn, asked.model, v, asked.since, asked.until)),
            }
            for v in sorted({asked.version, *asked.versions(conn)})
        ]
    own = next(v for v in versions if v["version"] == asked.version)
    result = {"model": asked.model, **own, "since": asked.since, "until": asked.until, "versions": versions}
    if as_json:
        print_json(result)
        return
    from rich.table import Table

    from monitoring.figures import usd

    table = Table("version", "requests", "errors", "p50 ms", "p95 ms", "p99 ms", "tok/s", "cost", box=None)
    for v in versions:
        table.add_row(
            _name(asked.model, v["version"], v["slot"]),
            str(v["requests"]),
            f"{v['error_rate']:.1%}",
            *(_number(v["latency_ms"][p]) for p in ("p50", "p95", "p99")),
            f"{v['tokens_per_second']:.0f}" if v["tokens_per_second"] is not None else "-",
            usd(v["cost_usd"]),
        )
    out.print(table)


@click.command()
@click.argument("ref", metavar="MODEL[:N]")
@_span_options
@click.option("--exit-code", is_flag=True, help="Exit with 3 when there is drift.")
@json_option
def drift(ref: str, since: str, until: str | None, exit_code: bool, as_json: bool) -> None:
    """Has the traffic moved away from what the version knows? Without :N the champion, with each version's verdict."""
    from infra.db import transaction
    from monitoring import drift as drifts

    with transaction() as conn:
        asked = _asked(conn, ref, since, until)
        verdicts = {
            v: drifts.judge(conn, asked.model, v, asked.since, asked.until)
            for v in sorted({asked.version, *asked.versions(conn)})
        }
    result = verdicts[asked.version]
    if not asked.by_number:
        listed = [{"version": v, "slot": asked.slots.get(v), "verdict": b["verdict"]} for v, b in verdicts.items()]
        result = {**result, "versions": listed}
    if as_json:
        print_json(result)
    else:
        _show_drift(result, asked)
    if exit_code and result["verdict"] == "drift":
        raise SystemExit(3)


def _show_drift(result: Mapping[str, Any], asked: _Asked) -> None:
    from rich.markup import escape
    from rich.table import Table

    colour = {"drift": "red", "stable": "green", "too_few": "yellow"}
    verdict = result["verdict"]
    found = result["attribution"]
    cause = f", cause: {found['cause']}" if found else ""
    name = _name(asked.model, asked.version, asked.slots.get(asked.version))
    out.print(f"{name}: [{colour[verdict]}]{verdict}[/]{cause}")
    out.print(escape(safe(result["explanation"])))
    if found and found["requests"]:
        out.print(f"such as the requests {', '.join(found['requests'])}")
    if result["features"]:
        table = Table("feature", "side", "statistic", "value", "threshold", "", box=None)
        for f in sorted(result["features"], key=lambda f: -f["value"] / f["threshold"]):
            table.add_row(
                f["name"],
                f["side"],
                f["statistic"],
                f"{f['value']:.3f}",
                f"{f['threshold']:.3f}",
                "[red]moved[/]" if f["drifted"] else "usual at these hours" if f["usual"] else "",
            )
        out.print(table)
    for other in result.get("versions", ()):
        if other["version"] != asked.version:
            name = _name(asked.model, other["version"], other["slot"])
            out.print(f"{name}: [{colour[other['verdict']]}]{other['verdict']}[/]")


@click.command()
@click.argument("ref", metavar="MODEL[:N]")
@_span_options
@json_option
def cost(ref: str, since: str, until: str | None, as_json: bool) -> None:
    """What a model costs: all versions and each, by day and by key; with :N that one."""
    from infra.db import transaction
    from infra.settings import get_settings
    from monitoring import cost as costs

    with transaction() as conn:
        asked = _asked(conn, ref, since, until)
        result = costs.report(conn, asked.model, asked.versions(conn), asked.since, asked.until)
    if as_json:
        print_json(result)
        return
    from rich.markup import escape
    from rich.table import Table

    from monitoring.figures import usd

    table = Table(
        "version",
        "requests",
        "tokens",
        "engine s",
        "cost",
        "per 1,000 requests",
        "making it",
        "pays off after",
        box=None,
    )
    for v in (*result["versions"], {"version": None, **result}):
        name = _name(asked.model, v["version"], asked.slots.get(v["version"])) if v["version"] else "all"
        per, made = v["usd_per_1000_requests"], v.get("making")
        table.add_row(
            name,
            str(v["requests"]),
            str(v["prompt_tokens"] + v["completion_tokens"]),
            f"{v['engine_seconds']:.1f}",
            usd(v["usd"]),
            usd(per),
            f"{usd(made['usd'])}, {usd(made['usd_per_1000_requests'])} per 1,000" if made else "",
            made["no_break_even"] or f"{made['requests_to_break_even']} requests" if made else "",
        )
    out.print(table)
    if result["keys"]:
        table = Table("key", "requests", "tokens", "cost", box=None)
        for key in result["keys"]:
            name = escape(safe(key["name"] or key["key_id"]))
            table.add_row(name, str(key["requests"]), str(key["tokens"]), usd(key["usd"]))
        out.print(table)
    if result["languages"]:
        table = Table("language", "requests", "tokens", "share", "characters a token", "cost", box=None)
        for each in result["languages"]:
            per = each["characters_per_token"]
            share = "" if each["share"] is None else f"{100 * each['share']:.1f} %"
            covers = "" if per is None else f"{per:.2f}"
            table.add_row(each["language"], str(each["requests"]), str(each["tokens"]), share, covers, usd(each["usd"]))
        out.print(table)
    month = result["month"]
    end = month["by"]
    if month["expected"] is not None:
        end = f"{usd(month['expected'])} ({usd(month['low'])} to {usd(month['high'])}), by {end}"
    of = f" of {usd(month['limit'])}" if month["limit"] is not None else ""
    out.print(f"this month: {usd(month['spent'])}{of} so far; at its end: {end}")
    watts = f"{get_settings().machine_watts:g} W (TUNESMITH_MACHINE_WATTS)"
    out.print(f"energy: {result['energy_kwh']:.3g} kWh while the engine worked, at {watts}")
    price = ", ".join(f"{name} {value:g}" for name, value in result["price"].items())
    out.print(f"priced by {result['priced_by']}: {price}")


@click.command()
@click.argument("model", required=False)
@click.option("--all", "closed", is_flag=True, help="Also those of the last thirty days that are over.")
@json_option
def alerts(model: str | None, closed: bool, as_json: bool) -> None:
    """Open alerts, of one model or of all."""
    from rich.markup import escape

    from infra.db import transaction
    from monitoring import alerts as kept
    from registry.names import check_model_name

    if model is not None:
        check_model_name(model)
    with transaction() as conn:
        found = kept.listing(conn, model, closed=closed)
        silences = [each for each in kept.silences(conn) if model in (None, each["model"])]
    if as_json:
        print_json({"alerts": [dict(alert) for alert in found], "silences": [dict(each) for each in silences]})
        return
    if not found:
        out.print("No alert is open.")
    for each in silences:
        until = f"{each['until'].astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
        what = f"{each['model']}: {each['rule'] or 'all rules'}"
        out.print(escape(safe(f"nobody is told of {what} until {until}: {each['reason']} ({each['actor']})")))
    for alert in found:
        state = "open" if alert["closed_at"] is None else f"over since {alert['closed_at'].astimezone(UTC):%H:%M:%SZ}"
        opened = f"{alert['opened_at'].astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
        began = f" since {alert['began_at'].astimezone(UTC):%H:%MZ}" if alert["began_at"] else ""
        cause = f"cause: {alert['cause']}{began}  " if alert["cause"] else ""
        said = f"{kept.title(alert['rule'], alert['cause'])} ({alert['rule']}): {alert['message']}"
        out.print(f"{opened}  {alert['severity']:8}  {state}  {cause}{escape(safe(said))}")


def _rule(name: str, known: Sequence[str]) -> str:
    """A rule by its name, or by its metric alone. Raises UsageError."""
    from infra.errors import UsageError

    found = [rule for rule in known if name in (rule, rule.removesuffix(" above").removesuffix(" below"))]
    if len(found) != 1:
        raise UsageError(f"There is no rule {name[:80]!a}.", hint=f"The model has {', '.join(known)}.")
    return found[0]


@click.command()
@click.argument("model")
@click.option("--rule", help="One rule, as `alerts` names it, such as drift; else all of the model's.")
@click.option("--for", "span", help="How long, such as 2h.")
@click.option("--off", is_flag=True, help="Tell of the model's alerts again, or of the rule's.")
@click.option("--reason", default="", help="Why; others see it.")
@json_option
def silence(model: str, rule: str | None, span: str | None, off: bool, reason: str, as_json: bool) -> None:
    """Have nobody told of a model's alerts for a while; they open and close all the same."""
    from infra.db import transaction
    from infra.durations import parse_duration
    from infra.errors import UsageError
    from monitoring import alerts as kept
    from registry import deployments
    from registry.desk import only_here

    only_here("silence")
    if off == (span is not None):
        raise UsageError("Say for how long, or --off.", hint="Such as --for 2h.")
    with transaction() as conn:
        deployments.read(conn, model)
        if rule is not None:
            rule = _rule(rule, kept.rules_known(conn, model))
        if span is None:
            ended = kept.unsilence(conn, model, rule)
            told = {"model": model, "ended": ended}
            said = f"{ended} silences ended." if ended != 1 else "1 silence ended."
        else:
            text = deployments.check_reason(reason, required=True)
            try:
                length = parse_duration(span)
            except ValueError as error:
                raise UsageError(f"--for: {error}.") from error
            until = kept.silence(conn, model, rule, length, actor=deployments.actor_here(), reason=text)
            told = {"model": model, "rule": rule, "until": until}
            what = f"alerts on {rule}" if rule else "alerts"
            said = f"Nobody is told of {model}'s {what} until {until.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}."
    if as_json:
        print_json(told)
    else:
        out.print(said, markup=False)


@click.command()
@click.argument("version", metavar="MODEL:N")
@_span_options
@click.option("--limit", type=click.IntRange(1, 10_000), default=200, show_default=True, help="The newest requests.")
@click.option("--shadow", is_flag=True, help="Nothing is sent: compare what it answered as a shadow.")
@json_option
def replay(version: str, since: str, until: str | None, limit: int, shadow: bool, as_json: bool) -> None:
    """Send MODEL:N what people asked the champion, before it serves, and compare the answers."""
    from infra.db import transaction
    from infra.errors import UsageError
    from monitoring import replay as replays
    from registry import deployments, versions
    from registry.names import parse_version
    from registry.statistics import in_words

    model, number = parse_version(version)
    begin, end = _span(since, until)
    with transaction() as conn:
        versions.get(conn, model, number)
        champion = deployments.read(conn, model).champion
        if champion is None or champion == number:
            raise UsageError(f"{version} has no other champion to be compared with.", hint="Name another version.")
        pairs = replays.shadowed(conn, model, number, champion, begin, end, limit) if shadow else []
    if not shadow:

        def tell(done: int, of: int) -> None:
            if done % 50 == 0 or done == of:
                err.print(f"{done} of {of} requests")

        pairs = replays.sent_again(model, number, champion, begin, end, limit, tell)
    found: dict[str, Any] = {
        "model": model,
        "version": number,
        "champion": champion,
        "source": "shadow" if shadow else "replay",
    }
    found |= replays.compare(pairs)
    if as_json:
        print_json(found)
        return
    out.print(f"{version} beside {model}:{champion}: {found['requests']} requests, {found['failed']} failed")
    for name, words in (("same", "the same answer"), ("similarity", "similarity (chrF)"), ("tokens", "tokens more"),
                        ("latency_ms", "milliseconds more")):  # fmt: skip
        out.print(f"  {words}: {in_words(found[name])}", markup=False)
    for example in found["examples"]:
        out.print(safe(f"- {_line(example['question'])}"), markup=False)
        out.print(safe(f"    then: {_line(example['then'])}"), markup=False)
        out.print(safe(f"    now:  {_line(example['now'])}"), markup=False)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:159] + "…"


def _name(model: str, version: int, slot: str | None) -> str:
    return f"{model}:{version}" + (f" ({slot})" if slot else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
