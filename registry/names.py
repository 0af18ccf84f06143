"""What a model may be called, and how a version is written: ``model``, ``model@champion``, ``model:7``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from infra.errors import UsageError

MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ReferredSlot = Literal["champion", "challenger", "shadow"]


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A version by number, or by the slot it holds (`number` is then None)."""

    model: str
    number: int | None = None
    slot: ReferredSlot = "champion"

    def __str__(self) -> str:
        return f"{self.model}:{self.number}" if self.number is not None else f"{self.model}@{self.slot}"


def check_model_name(text: str) -> str:
    """The name itself. Raises UsageError, with the allowed pattern and never more than 80 characters of the text."""
    if not MODEL_NAME.fullmatch(text):
        shown = text if len(text) <= 80 else text[:80] + "..."
        raise UsageError(
            f"{shown!a} is not a model's name.",
            hint="A name has 1 to 63 characters a-z, 0-9 and -, and does not begin with - (^[a-z0-9][a-z0-9-]{0,62}$).",
        )
    return text


def parse_ref(text: str) -> Ref:
    """``m:7``, ``m@champion`` (or challenger, shadow), or ``m``, which is ``m@champion``. Raises UsageError."""
    if ":" in text:
        model, _, number = text.partition(":")
        check_model_name(model)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number):
            raise UsageError(f"{number[:80]!a} is not a version's number.", hint=f"Write it as {model}:7.")
        return Ref(model=model, number=int(number))
    model, at, slot = text.partition("@")
    check_model_name(model)
    for known in get_args(ReferredSlot):
        if not at or slot == known:
            return Ref(model=model, slot=known)
    raise UsageError(f"{slot[:80]!a} is not a slot.", hint="Slots are champion, challenger and shadow.")


def parse_version(text: str) -> tuple[str, int]:
    """``m:7`` and nothing else, for commands that need a number. Raises UsageError."""
    ref = parse_ref(text)
    if ref.number is None:
        raise UsageError(f"{text!a} names no version.", hint=f"Write it as {ref.model}:7.")
    return ref.model, ref.number


def parse_share(text: str) -> float:
    """``10%`` or ``0.1`` as 0.1. Raises UsageError; a bare 1 is refused, since it could mean either 1 % or all."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / 100 if percent else float(number)
    except ValueError:
        share = 0.0
    if rest or not 0 < share <= 1 or (share == 1 and not percent):
        raise UsageError(f"{text[:40]!a} is not a share.", hint="Write 10% or 0.1; all of the traffic is 100%.")
    return share
