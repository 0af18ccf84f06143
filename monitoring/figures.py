"""How figures are written for people: 1.2 s, $0.0031, 12.4k, 3 min ago. Unknown is always a dash."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

from markupsafe import Markup, escape

DASH = "–"
_DIGEST = re.compile(r"\b(?:sha256:)?([0-9a-f]{12})[0-9a-f]{52}\b")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits at most, large numbers with k, M, G."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 0:
        return "−" + number(-value, digits)
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / {"G": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{scaled:.1f}".rstrip("0").rstrip(".") + unit
    if size == 0:
        return "0"
    if float(value).is_integer():
        return f"{int(value):,}".replace(",", "\u202f")
    if size < 10 ** -(digits + 1):
        return f"{value:.1e}".replace("e-0", "e-")
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(value: float | None) -> str:
    """A duration given in milliseconds: 0.4 ms, 84 ms, 1.2 s, 3 min."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 1:
        return f"{value:.2g} ms" if value else "0 ms"
    if value < 999.5:
        return f"{value:.0f} ms"
    return seconds(value / 1000)


def seconds(value: float | None) -> str:
    """A duration given in seconds, at the precision a person wants."""
    if value is None or not math.isfinite(value):
        return DASH
    if value < 0.9995:
        return milliseconds(value * 1000)
    if value < 10:
        return f"{value:.1f} s"
    if value < 90:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{minutes / 1440:.1f} d"


def usd(value: float | None) -> str:
    """US dollars; small amounts with two significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "$0"
    size = abs(value)
    if size >= 1000:
        return f"${number(value)}" if size >= 1e4 else f"${value:,.0f}"
    if size >= 0.1:
        return f"${value:.2f}"
    places = min(9, 1 - math.floor(math.log10(size)))
    return f"${value:.{places}f}"


def percent(value: float | None, places: int = 1) -> str:
    """A share of one."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:.{places}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + " %"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    if value is None or not math.isfinite(value):
        return DASH
    return ("+" if value > 0 else "−" if value < 0 else "±") + number(abs(value))


def metric(value: float | None, name: str) -> str:
    """A metric by its name's unit: shares stay shares, milliseconds become durations."""
    if name.endswith("_ms"):
        return milliseconds(value)
    if name.endswith("_usd"):
        return usd(value)
    return number(value)


METRICS = {
    "loss": "Loss",
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "p95_latency_ms": "p95 latency",
    "tokens_per_second": "Tokens per second",
    "cost_per_1000_usd": "Cost of 1,000 requests",
    "cost_per_1000_at_load_usd": "Cost of 1,000 requests under load",
}


def marked(text: str) -> Markup:
    """Prose whose `commands` and `words` stand in backticks, as code, and whose digests are short; everything else is
    escaped."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return _prose(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else _prose(p) for i, p in enumerate(parts))


def _prose(text: str) -> Markup:
    found, at = Markup(""), 0
    for match in _DIGEST.finditer(text):
        found += escape(text[at : match.start()]) + digest(match[0])
        at = match.end()
    return found + escape(text[at:])


def short(text: str) -> str:
    """A sentence whose digests are cut to their first twelve hex digits, where there is no title to hold the whole."""
    return _DIGEST.sub(r"\1", text)


def actor(text: str) -> Markup:
    """Who did something, by the name of the key; the whole in its title."""
    named = re.fullmatch(r"key:\S+ \((.+)\)", text)
    return Markup('<span title="{}">{}</span>').format(text, named[1] if named else text)


def words(name: str) -> str:
    """A metric's or feature's name as words."""
    return METRICS.get(name, name.replace("_", " ").replace("  ", " ").capitalize())


def stamp(at: datetime | None) -> str:
    """An absolute time in UTC, to the second."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at else DASH


def ago(at: datetime | None, now: datetime | None = None) -> Markup:
    """A time as a person says it, with the exact one in its title."""
    if at is None:
        return escape(DASH)
    now = now or datetime.now(UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"), stamp(at), _distance(now - at)
    )


def _distance(gone: timedelta) -> str:
    value = gone.total_seconds()
    if value < -30:
        return "in " + _span(-value)
    if value < 5:
        return "just now"
    return _span(value) + " ago"


def _span(value: float) -> str:
    if value < 60:
        return f"{value:.0f} s"
    if value < 3600:
        return f"{value / 60:.0f} min"
    if value < 36 * 3600:
        return f"{value / 3600:.0f} h"
    return f"{value / 86400:.0f} d"


def digest(text: str | None) -> Markup:
    """A digest's first twelve hex digits, the whole in its title."""
    if not text:
        return escape(DASH)
    short = text.partition(":")[2][:12] or text[:12]
    return Markup('<code class="digest" title="{}">{}</code>').format(escape(text), short)


def plural(count: int, one: str, many: str | None = None) -> str:
    """1 request, 12.4k requests."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"
