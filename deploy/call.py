"""What is known of one inference request, from its arrival to its event."""

from __future__ import annotations

import time
import uuid
from typing import Any

from uuid_utils.compat import uuid7

from deploy.auth import Identity
from deploy.routing import Served, Wanted
from deploy.shapes import Asked, Kind
from deploy.upstream import BadAnswer, own_words
from infra.errors import TunesmithError
from registry.privacy import redact

CHARACTERS = 4  # of a token, about, where nobody counted
_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}


class Call:
    """Grows with the request; becomes its event."""

    def __init__(self, kind: Kind, identity: Identity, client_request_id: str | None) -> None:
        self.id: uuid.UUID = uuid7()
        self.started = time.perf_counter()
        self.kind: Kind = kind
        self.identity = identity
        self.client_request_id = client_request_id
        self.asked: Asked | None = None
        self.wanted: Wanted | None = None
        self.served: Served | None = None
        self.slot: str = "none"
        self.status = 0
        self.error: str | None = None
        self.has_place = False  # whether it counts among those that are being answered
        self.makes_way = False  # and among those of them that make way for others
        self.sent = False  # whether the answer's head has gone out
        self.first_at: float | None = None
        self.text: list[str] = []
        self.pieces = 0  # tokens of all choices, about, where nobody counts them
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.engine_seconds = 0.0
        self.mean_logprob: float | None = None
        self.engine_ttft_ms: float | None = None
        self.queue_ms = 0.0  # how long it waited in the engine
        self.finish_reason: str | None = None

    @property
    def background(self) -> bool:
        """Whether it makes way for others in an engine, so that its wait says nothing about its version."""
        return self.slot == "shadow" or (self.asked is not None and self.asked.background)

    def take(self, piece: dict[str, Any]) -> None:
        """Learn from an answer or a chunk of one, and put our name on it. Raises BadAnswer for one of another shape."""
        try:
            self._learn(piece)
        except (AttributeError, TypeError, ValueError) as error:
            raise BadAnswer("What answered is not OpenAI's shape.") from error
        piece["id"] = f"{_PREFIX[self.kind]}{self.id}"
        if self.served is not None:
            piece["model"] = self.served.name

    def fail(self, error: TunesmithError) -> None:
        """End with an error. Where no text is kept, what who answered says in it is not either."""
        kept = self.served is not None and self.served.keep_text
        self.status = error.http_status
        self.error = f"{error.code}: {redact(error.message) if kept else own_words(error)}"

    def _learn(self, piece: dict[str, Any]) -> None:
        if (usage := piece.get("usage")) is not None:
            self.prompt_tokens = _tokens(usage.get("prompt_tokens"))
            self.completion_tokens = _tokens(usage.get("completion_tokens"))
        extra = piece.pop("tunesmith", None)  # our engine's own
        if extra is not None and self.served is not None and not self.served.hosted:
            self.engine_seconds = float(extra.get("engine_seconds") or 0.0)
            self.mean_logprob = extra.get("mean_logprob")
            self.engine_ttft_ms = extra.get("ttft_ms")
            self.queue_ms = float(extra.get("queue_ms") or 0.0)
        for choice in piece.get("choices", ()):
            said = choice.get("delta") or choice.get("message") or choice
            self._count(said, choice)
            if choice.get("index", 0) != 0:
                continue
            text = said.get("content") or said.get("text")
            if text and not isinstance(text, str):
                raise TypeError("text is no string")
            if text:
                if self.first_at is None:
                    self.first_at = time.perf_counter()
                self.text.append(text)
            reason = choice.get("finish_reason")
            if reason and not isinstance(reason, str):
                raise TypeError("finish_reason is no string")
            self.finish_reason = reason or self.finish_reason

    def _count(self, said: dict[str, Any], choice: dict[str, Any]) -> None:
        texts = [said.get(name) for name in ("content", "text", "reasoning_content", "reasoning")]
        size = sum(len(text) for text in texts if isinstance(text, str))
        if choice.get("delta") is not None or (self.asked is not None and self.asked.stream):
            self.pieces += bool(size or said.get("tool_calls"))  # a token a chunk
        elif size or said.get("tool_calls"):
            self.pieces += 1 + size // CHARACTERS


def _tokens(value: Any) -> int:
    """What a model says that it counted, as far as it can be."""
    return min(max(int(value or 0), 0), 2**31 - 1)
