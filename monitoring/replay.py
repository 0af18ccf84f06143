"""A candidate's answers beside the champion's, to requests that people really sent: kept ones that are sent again, or
the copies that a shadow was sent. Needs the model to keep text (``monitoring.keep_text``), redacted as it is.

What is sent again is sent as a chat with the candidate's own settings: what a client asked for beside its messages
(temperature, length) is not kept. In an engine it makes way for all other requests, as copies do; what it waited there
is no part of its latency.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from deploy.auth import create_key, revoke_key
from deploy.shapes import BACKGROUND
from infra.db import Connection, load_queries, transaction
from infra.errors import NotFound, TunesmithError, Unreachable
from infra.settings import get_settings
from monitoring.feedback import similarity
from registry.statistics import mean_ci, paired_difference

SQL = load_queries(Path(__file__).with_suffix(".sql"))
_PARALLEL = 4
_SHOWN = 5
_SECONDS = 600.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One request: what was said then, and what the candidate says; `error` where it says nothing."""

    request_id: str
    question: str
    then: str
    then_ms: float
    then_tokens: int
    now: str | None
    now_ms: float
    now_tokens: int
    error: str | None = None


def shadowed(
    conn: Connection, model: str, version: int, champion: int, since: datetime, until: datetime, limit: int
) -> list[Pair]:
    """What a version answered as a shadow to copies of what the champion answered. Raises NotFound where it was sent
    no copies, or no text was kept."""
    values = {"model": model, "version": version, "champion": champion, "since": since, "until": until, "limit": limit}
    rows = conn.execute(SQL["copies"], values).fetchall()
    if not rows:
        raise NotFound(
            f"{model}:{version} was sent no copies in this time.",
            hint=f"`tunesmith shadow {model}:{version}` sends it some.",
        )
    pairs = [
        Pair(
            request_id=str(row["id"]), question=_question(row["messages"]), then=row["answer"],
            then_ms=row["latency_ms"], then_tokens=row["completion_tokens"], now=row["now"], now_ms=row["now_ms"],
            now_tokens=row["now_tokens"], error=row["error"],
        )
        for row in rows
        if row["answer"] is not None and (row["now"] is not None or row["status"] != 200)
    ]  # fmt: skip
    if not pairs:
        raise _without_text(model)
    return pairs


def sent_again(
    model: str, version: int, champion: int, since: datetime, until: datetime, limit: int, progress: Progress
) -> list[Pair]:
    """Send a version what people asked the champion, as requests that name it, a few at a time, with a key that is
    revoked at the end. Raises NotFound where no text was kept, Unreachable without a gateway."""
    values = {"model": model, "champion": champion, "since": since, "until": until, "limit": limit}
    with transaction() as conn:
        rows = conn.execute(SQL["kept"], values).fetchall()
        if not rows:
            raise _without_text(model)
        # A name of its own: who sends the same at the same time must not end this key's secret
        name = f"replay to {model}:{version} {uuid.uuid4().hex[:8]}"
        key = create_key(conn, name=name, role="service", watched=False)  # what we ask is nobody's traffic
    try:
        return _ask_all(rows, f"{model}:{version}", key.key, progress)
    finally:
        with transaction() as conn:
            revoke_key(conn, key.id)


def _ask_all(rows: Sequence[Mapping[str, Any]], name: str, key: str, progress: Progress) -> list[Pair]:
    import httpx

    url = get_settings().need("gateway_url").rstrip("/")
    head = {"authorization": f"Bearer {key}"}
    pairs: list[Pair] = []
    with (
        httpx.Client(base_url=url, headers=head, timeout=_SECONDS, trust_env=False) as client,
        ThreadPoolExecutor(_PARALLEL) as threads,
    ):

        def ask(row: Mapping[str, Any]) -> Pair:
            then = {
                "request_id": str(row["id"]), "question": _question(row["messages"]), "then": row["answer"],
                "then_ms": row["latency_ms"], "then_tokens": row["completion_tokens"],
            }  # fmt: skip
            body = {"model": name, "messages": row["messages"], "priority": BACKGROUND}
            try:
                # Named as a copy, so that who erases the one erases the other
                answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": str(row["id"])})
                waited = float(answer.headers.get("x-tunesmith-queue-ms", 0))
                said, milliseconds = answer.json(), max(0.0, 1000 * answer.elapsed.total_seconds() - waited)
            except (httpx.HTTPError, ValueError) as error:
                raise Unreachable(f"No gateway answers at {url}: {type(error).__name__}.") from error
            if answer.status_code != 200:
                why = str(said.get("error", {}).get("message", answer.status_code))
                return Pair(**then, now=None, now_ms=milliseconds, now_tokens=0, error=why)
            text = said["choices"][0]["message"]["content"] or ""
            tokens = int((said.get("usage") or {}).get("completion_tokens") or 0)
            return Pair(**then, now=text, now_ms=milliseconds, now_tokens=tokens)

        for done, pair in enumerate(threads.map(ask, rows), start=1):
            pairs.append(pair)
            progress(done, len(rows))
    return pairs


def compare(pairs: Sequence[Pair]) -> dict[str, Any]:
    """``{"requests", "failed", "same", "similarity", "tokens", "latency_ms", "examples"}``: the shares and means with
    95 % intervals, differences as candidate less champion, and the answers that differ most."""
    answered = [pair for pair in pairs if pair.now is not None]
    if not answered:
        raise TunesmithError(f"None of {len(pairs)} requests was answered: {pairs[0].error}.")
    close = [similarity(pair.now, pair.then) or 0.0 for pair in answered]
    tokens = [(float(pair.now_tokens), float(pair.then_tokens)) for pair in answered]
    times = [(pair.now_ms, pair.then_ms) for pair in answered]
    worst = sorted(zip(close, answered, strict=True), key=lambda each: each[0])[:_SHOWN]

    def difference(values: list[tuple[float, float]]) -> dict[str, Any]:
        now, then = (list(side) for side in zip(*values, strict=True))
        return paired_difference(now, then, higher_is_better=False).to_json()

    return {
        "requests": len(pairs),
        "failed": len(pairs) - len(answered),
        "same": mean_ci([float(p.now == p.then) for p in answered], higher_is_better=True).to_json(),
        "similarity": mean_ci(close, higher_is_better=True).to_json(),
        "tokens": difference(tokens),
        "latency_ms": difference(times),
        "examples": [
            {"request_id": p.request_id, "question": p.question, "then": p.then, "now": p.now, "similarity": value}
            for value, p in worst
            if value < 1
        ],
    }


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    return str(messages[-1]["content"])


def _without_text(model: str) -> NotFound:
    return NotFound(
        f"No text of {model}'s requests was kept in this time.",
        hint="Its pipeline file needs monitoring: {keep_text: true}.",
    )
