"""Personal data and secrets in text: found by small patterns, replaced by their kind.

Meant for what has a fixed form: e-mail addresses, phone numbers, payment cards (Luhn), IBANs (ISO 13616 mod 97),
IP addresses, access keys. Names and street addresses have no form and are not found.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One piece of personal data: its kind, and where it stands in the text."""

    kind: str
    start: int
    end: int


def redact(text: str) -> str:
    """The text with every finding replaced by its kind in brackets, such as ``[EMAIL]``. Stable: redacting the
    result changes nothing."""
    parts, position = [], 0
    for finding in find(text):
        parts += [text[position : finding.start], f"[{finding.kind}]"]
        position = finding.end
    return "".join([*parts, text[position:]])


def find(text: str) -> list[Finding]:
    """All findings, by position, none overlapping; where two kinds fit, the one listed first in `_PATTERNS` wins."""
    if not _POSSIBLE.search(text):
        return []
    found: list[Finding] = []  # by position
    for kind, pattern, check in _PATTERNS:
        taken, more = [f.start for f in found], list[Finding]()
        for start, end in _matches(pattern, check, text):  # none of one pattern overlap
            place = bisect_right(taken, start)
            free_before = place == 0 or found[place - 1].end <= start
            if free_before and (place == len(found) or end <= found[place].start):
                more.append(Finding(kind=kind, start=start, end=end))
        if more:
            found = sorted(found + more, key=lambda f: f.start)
    return found


def _matches(pattern: re.Pattern[str], check: Callable[[str], bool], text: str) -> Iterator[tuple[int, int]]:
    for match in pattern.finditer(text):
        start, end = match.span("value") if "value" in pattern.groupindex else match.span()
        if check(text[start:end]):
            yield start, end


def _luhn(text: str) -> bool:
    """The check digit of payment cards, ISO/IEC 7812-1 annex B; 13 to 19 digits that are not all the same."""
    digits = [int(c) for c in text if c.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    return sum(d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits))) % 10 == 0


def _iban(text: str) -> bool:
    """ISO 13616: country and check digits moved to the end, letters as 10 to 35, the number is 1 modulo 97."""
    packed = re.sub(r"\s", "", text).upper()
    return 15 <= len(packed) <= 34 and int("".join(str(int(c, 36)) for c in packed[4:] + packed[:4])) % 97 == 1


def _ip(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def _phone(text: str) -> bool:
    """Eight to fifteen digits (ITU-T E.164), written as people write phone numbers: not a date, not a bare count."""
    if re.fullmatch(r"\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./ ]\d{1,2}[-./ ]\d{4}", text.strip()):
        return False
    digits = sum(c.isdigit() for c in text)
    return 8 <= digits <= 15


def _always(text: str) -> bool:
    return True


# Every quantifier is bounded and no two neighbours can match the same character, so that no text takes long.
_PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "KEY",
        re.compile(
            r"-----BEGIN (?:[A-Z]{1,12} ){0,3}PRIVATE KEY-----[A-Za-z0-9+/=\s]{0,8000}(?:-----END [A-Z ]{1,40}-----)?"
            r"|\b(?:sk|pk|rk)[-_](?:live[-_]|test[-_]|proj-|ant-)?[A-Za-z0-9_-]{20,200}"  # OpenAI, Stripe, Anthropic
            r"|\bgh[pousr]_[A-Za-z0-9]{30,255}\b|\bgithub_pat_[A-Za-z0-9_]{22,255}\b"
            r"|\bhf_[A-Za-z0-9]{30,60}\b|\bglpat-[A-Za-z0-9_-]{20,60}|\bxox[abprs]-[A-Za-z0-9-]{10,200}"
            r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{35}"
            r"|\beyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}"  # JSON web tokens
        ),
        _always,
    ),
    (
        "EMAIL",
        re.compile(
            r"(?<![\w.+-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,5}"
            r"[A-Za-z]{2,24}\b"
        ),
        _always,
    ),
    ("IBAN", re.compile(r"\b[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,3})?\b"), _iban),
    ("CARD", re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w]|\.\d)"), _luhn),
    ("IP", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"), _ip),
    (
        "IP",
        re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f:]{0,38}:[0-9A-Fa-f:]{0,38}:)[0-9A-Fa-f:]{6,39}(?![\w:])"),
        lambda text: text.count(":") >= 3 and _ip(text),
    ),
    (
        "PHONE",  # with a +, a bracketed area code, or at least two separators: bare digits are order numbers too
        re.compile(
            r"(?<![\w.+])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,4}"
            r"|\(\d{2,5}\)[ .-]?\d{3,5}(?:[ .-]\d{2,5}){0,3}"
            r"|\d{3}[ .-]\d{3}[ .-]\d{4}|0\d{2,4}[ ./-]\d{3,4}[ .-]\d{3,5})(?!\w|[.-]\d)"
        ),
        _phone,
    ),
)
_POSSIBLE = re.compile(r"@|\d|PRIVATE KEY|eyJ|[a-z]{2,4}[-_]\w{10}|::|[0-9a-f]:[0-9a-f]", re.IGNORECASE)
