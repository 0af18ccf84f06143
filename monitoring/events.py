"""Events of other gateways: checked, given features, priced and stored like our own."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deploy import recorder
from deploy.recorder import Event, event_time
from infra.db import Connection, load_queries
from infra.errors import UsageError
from infra.settings import get_settings
from infra.storage import text_digest
from registry import pricing
from registry.names import MODEL_NAME
from registry.pricing import Price
from registry.privacy import redact
from registry.profile import FEATURES, Answer, Extractor, Profile

SQL = load_queries(Path(__file__).with_suffix(".sql"))

_MAX_PROBLEMS = 20
_AHEAD = timedelta(hours=1)  # that a sender's clock may be before ours
_Count = Field(default=0, ge=0, le=2**31 - 1)
_Amount = Field(default=0.0, ge=0, le=1e12, allow_inf_nan=False)


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str = Field(max_length=40)
    content: str = Field(max_length=1_000_000)

    @field_validator("role", "content")
    @classmethod
    def _storable(cls, value: str) -> str:
        return value.replace("\0", "\ufffd")


class Foreign(BaseModel):
    """One event, as sent. `id` is a UUIDv7 that the sender keeps through repeats; its time is the event's, not older
    than events are kept. Text is used for the features and kept, redacted, only where the model keeps text; `user` is
    whose it was, kept as a hash, as in a request of ours. Without `cost_usd` the model's price holds. `mean_logprob` as
    in Answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: uuid.UUID
    model: str = Field(pattern=f"^{MODEL_NAME.pattern}$")
    version: int = Field(ge=1, le=2**31 - 1)
    slot: Literal["champion", "challenger", "shadow", "pinned"] = "champion"
    client_request_id: str | None = Field(default=None, max_length=200)
    status: int = Field(ge=100, le=599)
    error: str | None = Field(default=None, max_length=2000)
    stream: bool = False
    prompt_tokens: int = _Count
    completion_tokens: int = _Count
    ttft_ms: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)
    latency_ms: float = Field(ge=0, le=1e9, allow_inf_nan=False)
    engine_seconds: float = _Amount
    cost_usd: float | None = Field(default=None, ge=0, le=1e12, allow_inf_nan=False)
    finish_reason: str | None = Field(default=None, max_length=40)
    mean_logprob: float | None = Field(default=None, le=0, allow_inf_nan=False)
    messages: list[Message] | None = Field(default=None, max_length=1000)
    answer: str | None = Field(default=None, max_length=1_000_000)
    user: str | None = Field(default=None, min_length=1, max_length=512)

    @field_validator("id")
    @classmethod
    def _version_7(cls, value: uuid.UUID) -> uuid.UUID:
        if value.version != 7:
            raise ValueError("must be a UUIDv7, whose time is the event's")
        now, kept = datetime.now(UTC), timedelta(days=get_settings().event_retention_days)
        if not now - kept <= event_time(value) <= now + _AHEAD:
            raise ValueError(
                f"its time must be of the last {kept.days} days, which events are kept for, and not to come"
            )
        return value

    @field_validator("client_request_id", "error", "finish_reason", "answer")
    @classmethod
    def _storable(cls, value: str | None) -> str | None:
        return value.replace("\0", "\ufffd") if value else value


def parse(body: bytes) -> list[Foreign]:
    """Events from lines of JSON. Raises UsageError that names each wrong line and why."""
    found, problems = [], []
    for number, line in enumerate(body.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(Foreign.model_validate(orjson.loads(line)))
        except orjson.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON: {error.msg}")
        except ValidationError as error:
            problems += [
                f"line {number}: {'.'.join(str(part) for part in e['loc'])}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors(include_url=False, include_input=False)
            ]
        if len(problems) >= _MAX_PROBLEMS:
            break
    if problems:
        raise UsageError(f"These are not events: {'; '.join(problems[:_MAX_PROBLEMS])}.", hint="Nothing was taken.")
    return found


def store(conn: Connection, replica: uuid.UUID, found: Sequence[Foreign]) -> int:
    """Store events; returns how many were new. Raises UsageError for versions that are not known."""
    refs = sorted({(event.model, event.version) for event in found})
    known = {
        (row["model"], row["number"]): row
        for row in conn.execute(
            SQL["versions"], {"models": [model for model, _ in refs], "numbers": [number for _, number in refs]}
        )
    }
    if unknown := [f"{model}:{number}" for model, number in refs if (model, number) not in known]:
        raise UsageError(f"There is no version {', '.join(unknown[:10])}.", hint="Nothing was taken.")
    extractors = {ref: Extractor(Profile.from_json(row["profile"])) for ref, row in known.items()}
    rows = []
    for event in found:
        ref = (event.model, event.version)
        monitoring = known[ref]["settings"].get("monitoring") or {}
        price = pricing.in_force(monitoring, get_settings().machine_usd_per_hour)
        rows.append(_event(event, extractors[ref], price, keep_text=bool(monitoring.get("keep_text", False))))
    return recorder.store(conn, replica, rows) if rows else 0


def _event(event: Foreign, extractor: Extractor, price: Price, *, keep_text: bool) -> Mapping[str, Any]:
    messages = [message.model_dump() for message in event.messages or ()]
    features: list[float] = []
    if event.status == 200 and event.messages is not None and event.answer is not None:
        answer = Answer(
            text=event.answer,
            completion_tokens=event.completion_tokens,
            finish_reason=event.finish_reason,
            mean_logprob=event.mean_logprob,
        )
        features = extractor.features(messages, answer, event.prompt_tokens)
    kept = keep_text and event.messages is not None
    cost = event.cost_usd
    if cost is None:
        cost = price.cost_usd(event.prompt_tokens, event.completion_tokens, event.engine_seconds)
    made = Event(
        **event.model_dump(exclude={"messages", "answer", "mean_logprob", "cost_usd", "user"}),
        cost_usd=cost,
        subject=None if event.user is None else text_digest(event.user),
        features=features or [float("nan")] * len(FEATURES),
        messages=[{**m, "content": redact(m["content"]).replace("\0", "\ufffd")} for m in messages] if kept else None,
        answer=redact(event.answer) if kept and event.answer is not None else None,
    )
    return {**asdict(made), "id": str(made.id)}
