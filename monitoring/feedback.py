"""What people say about answers: a score, a label, or what the answer should have been.

Feedback names its request by our id (bare, or as the answer's ``chatcmpl-<id>``), or by the ``x-request-id`` that
the client sent. It may come before its event has reached the database, since events travel in batches: it is kept,
with the time that is inside our ids, and joined to its request when that arrives (`settle`).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy.recorder import event_time
from infra.db import Connection, load_queries, one
from infra.errors import NotFound, UsageError
from infra.settings import get_settings
from registry.privacy import redact

SQL = load_queries(Path(__file__).with_suffix(".sql"))

MAX_LINE_BYTES = 1_000_000
MAX_REJECTED = 0.05
_OURS = re.compile(r"(?:(?:chatcmpl|cmpl)-)?([0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12})", re.IGNORECASE)


class Item(BaseModel):
    """One piece of feedback, as sent. `id` is another name of `request_id`; at least one of the rest is given."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=100_000)

    request_id: str | None = Field(default=None, min_length=1, max_length=200)
    id: str | None = Field(default=None, min_length=1, max_length=200)
    score: float | None = Field(default=None, ge=-1, le=1, allow_inf_nan=False)
    label: str | None = Field(default=None, max_length=200)
    correction: str | None = None

    @field_validator("request_id", "id", "label", "correction")
    @classmethod
    def _storable(cls, value: str | None) -> str | None:
        if value is not None and "\0" in value:
            raise ValueError("must not hold a NUL character")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Item:
        if (self.request_id is None) == (self.id is None):
            raise ValueError("give the request as request_id, or as id")
        if not self.model_fields_set & {"score", "label", "correction"}:
            raise ValueError("give a score, a label or a correction")
        return self

    @property
    def request(self) -> str:
        return self.request_id or self.id or ""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A line of a file that is not feedback, and why."""

    line: int
    reason: str


def parse(value: Any) -> Item:
    """Feedback from JSON. Raises UsageError that names every wrong field."""
    try:
        return Item.model_validate(value)
    except ValidationError as error:
        problems = [
            ": ".join([*(str(part) for part in e["loc"][:1]), e["msg"].removeprefix("Value error, ")])
            for e in error.errors(include_url=False, include_input=False)
        ]
        raise UsageError(
            f"This is not feedback: {'; '.join(problems)}.",
            hint='Such as {"request_id": "...", "score": -1, "correction": "..."}, the score from -1 to 1.',
        ) from error


def record(
    conn: Connection,
    items: Sequence[Item],
    *,
    key_id: str | None = None,
    own_only: bool = False,
    model: str = "",
    reviewing: bool = False,
) -> list[uuid.UUID]:
    """Keep feedback, the last of a request winning field by field; returns our ids of the requests.

    With `own_only`, ids that a client gave are looked for among `key_id`'s requests. With `model`, requests that
    went to another model are refused. Corrections are redacted before they are written. The ids are sorted. A score of
    who is `reviewing` stands apart from what users say: it is of answers that were chosen for being doubtful.
    Raises NotFound for a request that is not known, UsageError for an id that cannot be ours; nothing is kept then.
    """
    found = [(_resolve(conn, item.request, key_id if own_only else None, model), item) for item in items]
    found.sort(key=lambda pair: pair[0])  # stable, so the last wins; one order for all writers, so none deadlocks
    if model:
        _check_model(conn, [identifier for identifier, _ in found], model)
    with conn.cursor() as cursor:
        cursor.executemany(
            SQL["put"],
            [
                {
                    "request_id": identifier,
                    "request_at": event_time(identifier),
                    "model": "",
                    "key_id": None if reviewing else key_id,
                    "reviewer": (key_id or "") if reviewing else None,
                    "reviewing": reviewing,
                    "score": None if reviewing else item.score,
                    "review": item.score if reviewing else None,
                    "label": item.label,
                    "correction": None if item.correction is None else redact(item.correction),
                    **{f"has_{name}": name in item.model_fields_set for name in ("label", "correction")},
                    "has_score": "score" in item.model_fields_set and not reviewing,
                }
                for identifier, item in found
            ],
        )
    ids = [identifier for identifier, _ in found]
    settle(conn, ids)
    return ids


def settle(conn: Connection, ids: Sequence[uuid.UUID] | None = None, *, late: bool = False, limit: int = 1000) -> int:
    """Join feedback to its requests: model, version, and the similarity of a correction to the kept answer.
    Without `ids`, what still waits for its request's event: of the last minutes, or `late`, all. Returns how many were
    joined."""
    if ids is None:
        ids = [row["request_id"] for row in conn.execute(SQL["unsettled"], {"limit": limit, "late": late})]
    if not ids:
        return 0
    conn.execute(SQL["forget_erased"], {"ids": list(ids)})
    rows = conn.execute(SQL["join_events"], {"ids": list(ids)}).fetchall()
    with conn.cursor() as cursor:
        cursor.executemany(
            SQL["settle"],
            [
                {
                    "id": row["request_id"],
                    "model": row["model"],
                    "version": row["version"],
                    "similarity": similarity(row["answer"], row["correction"]),
                }
                for row in rows
            ],
        )
    return len(rows)


def similarity(answer: str | None, correction: str | None) -> float | None:
    """chrF / 100 (Popovic 2015, sacrebleu's defaults), 0 to 1; None when either text is not there."""
    if answer is None or correction is None:
        return None
    if not correction.strip():  # chrF of nothing is not defined: right only when the answer is nothing too
        return float(not answer.strip())
    return min(1.0, max(0.0, float(_chrf().sentence_score(answer, [correction]).score) / 100))


@lru_cache(maxsize=1)
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def summary(conn: Connection, model: str, version: int | None, since: datetime, until: datetime) -> Mapping[str, Any]:
    """Feedback on the requests of a time: n, mean_score, corrections, mean_similarity; means null without any."""
    return one(conn, SQL["summary"], {"model": model, "version": version, "since": since, "until": until})


def usable_corrections(conn: Connection, model: str, after: datetime | None, most: int | None = None) -> int:
    """Corrections of requests whose text was kept, given after a time: what a retraining would use. No more than `most`
    are counted."""
    return int(one(conn, SQL["usable_corrections"], {"model": model, "after": after, "most": most})["n"])


def drop_old(conn: Connection, days: int) -> None:
    """Forget feedback older than `days`, also that of requests nobody has seen: events may wait long in a spool."""
    conn.execute(SQL["drop_old"], {"days": days})


def read_lines(path: Path) -> Iterator[tuple[int, Item | Rejected]]:
    """The lines of a JSONL file, blank ones left out, each as feedback or as the reason why it is none. A line is
    never held longer than MAX_LINE_BYTES. Raises NotFound when there is no such file."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotFound(f"The file {path} cannot be read: {error.strerror}.") from error
    with file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, Rejected(line=number, reason=f"longer than {MAX_LINE_BYTES} bytes")
            elif raw.strip():
                yield number, _parse_line(number, raw)


def _parse_line(number: int, raw: bytes) -> Item | Rejected:
    try:
        return parse(orjson.loads(raw))
    except orjson.JSONDecodeError as error:
        return Rejected(line=number, reason=f"not JSON: {error.msg} at column {error.colno}")
    except UsageError as error:
        return Rejected(line=number, reason=error.message)


def _resolve(conn: Connection, request: str, key_id: str | None, model: str) -> uuid.UUID:
    """Our id of a request. An id of ours is taken as it is, since its event may be on its way."""
    asked = {
        "client_request_id": request,
        "key_id": key_id,
        "days": get_settings().event_retention_days,
        "model": model,
    }
    if (match := _OURS.fullmatch(request)) and (identifier := uuid.UUID(match[1])).version == 7:
        now = datetime.now(UTC)
        # Clients make such ids too: one that is known as a client's, and not as ours, is a client's
        ours = conn.execute(SQL["is_ours"], {"id": identifier, "at": event_time(identifier)}).fetchone()
        if ours is None and (row := conn.execute(SQL["by_client_id"], asked).fetchone()) is not None:
            return uuid.UUID(str(row["id"]))
        days = timedelta(days=get_settings().event_retention_days)
        if not now - days <= event_time(identifier) <= now + timedelta(hours=1):
            raise UsageError(
                f"The request {request[:80]!a} is older than what is kept, or of the future.",
                hint="Give the id of an answer of this gateway.",
            )
        return identifier
    row = conn.execute(SQL["by_client_id"], asked).fetchone()
    if row is None:
        raise NotFound(
            f"No request {request[:80]!a} is known.",
            hint="Give the answer's `id`, or the `x-request-id` that was sent, some seconds after the answer.",
        )
    return uuid.UUID(str(row["id"]))


def _check_model(conn: Connection, ids: Sequence[uuid.UUID], model: str) -> None:
    rows = conn.execute(SQL["models_of"], {"ids": list(ids), "ats": [event_time(i) for i in ids]})
    for row in rows:
        if row["model"] != model:
            raise UsageError(f"The request {row['id']} went to {row['model']}, not to {model}.")
