"""What an engine is asked, and what it answers: vLLM's subset of OpenAI's chat and text completions.

What would change an answer and is not supported (tools, response formats, penalties, logit bias) is refused;
unknown fields are ignored, as vLLM does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy.decoding import Row
from deploy.sampling import Sampling
from deploy.scheduler import Piece
from infra.errors import UsageError

MAX_N = 8
MAX_TOP_LOGPROBS = 20


class BadRequest(UsageError):
    """Not a request this engine can answer; `details["param"]` names the field."""

    code = "invalid_request"


class TooLong(BadRequest):
    """A prompt that leaves no room for an answer."""

    code = "context_length_exceeded"


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Ask(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str = Field(max_length=256)
    n: int = Field(default=1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    seed: int | None = None
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False  # vLLM's
    priority: int = Field(default=0, ge=-(2**63), lt=2**63)  # vLLM's: lower goes first; above 0, it makes way
    presence_penalty: float = 0
    frequency_penalty: float = 0
    logit_bias: dict[str, float] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _supported(self) -> Self:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not supported by this engine")
        return self

    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to each token are wanted; None: no log-probabilities at all."""
        raise NotImplementedError

    def sampling(self, room: int, default: int | None, choice: int) -> Sampling:
        """For a prompt that leaves `room` tokens of the context. Raises BadRequest when the answer may not fit."""
        most = self.max_tokens or min(room, default or room)
        if most > room:
            raise BadRequest(
                f"The prompt leaves {max(room, 0)} tokens of this engine's context; max_tokens is {most}.",
                hint="Shorten the prompt or lower max_tokens.",
                details={"param": "max_tokens"},
            )
        return Sampling(
            max_tokens=most,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed + choice,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            top_logprobs=self.top_logprobs_wanted() or 0,
        )


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _text_of_parts(cls, value: Any) -> Any:
        if isinstance(value, list):
            for part in value:
                if isinstance(part, dict) and (what := part.get("type", "text")) != "text":
                    raise ValueError(f"this engine takes text only, and no part of type {what!a:.80}")
            return "".join(TextPart.model_validate(part).text for part in value)
        return "" if value is None else value


class ChatAsk(_Ask):
    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] = []
    tool_choice: Any = "auto"
    response_format: dict[str, Any] = {"type": "text"}

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.tools and self.tool_choice != "none":
            raise ValueError("`tools` are not supported by this engine")
        if self.response_format.get("type") != "text":
            raise ValueError("`response_format` other than text is not supported by this engine")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    def top_logprobs_wanted(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionAsk(_Ask):
    prompt: list[str] | list[list[Token]] = Field(min_length=1, max_length=64)
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_or_many_prompts(cls, value: Any) -> Any:
        single = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int))
        return [value] if single else value

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("`best_of` is not supported by this engine")
        return self

    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


class LoadAsk(BaseModel):
    """vLLM's: add an adapter under a name that never changes its meaning."""

    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    lora_path: str = Field(min_length=1, max_length=4096)
    digests: dict[str, str] = Field(default_factory=dict)  # ours: what the files must be, by name


class UnloadAsk(BaseModel):
    lora_name: str = Field(max_length=256)


A = TypeVar("A", bound=BaseModel)


def parse(kind: type[A], raw: bytes) -> A:
    """A request's body, checked. Raises BadRequest, naming the field."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error}.") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise BadRequest(f"{where}: {said}." if where else f"{said}.", details={"param": where or None}) from None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Makes the objects of one request's answer. `rows`: its choices; `tokenizer` spells single tokens."""

    id: str
    ask: ChatAsk | CompletionAsk
    rows: Sequence[Row]
    tokenizer: Any
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def _chat(self) -> bool:
        return isinstance(self.ask, ChatAsk)

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The answer when nothing is streamed: all pieces of all choices."""
        choices = []
        mine: dict[int, list[Piece]] = {index: [] for index in range(len(self.rows))}
        for piece in pieces:
            mine[piece.index].append(piece)
        for index, parts in mine.items():
            text = "".join(part.text for part in parts)
            choice: dict[str, Any] = {"index": index, "finish_reason": parts[-1].finish, "logprobs": None}
            choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            if self.ask.top_logprobs_wanted() is not None:
                choice["logprobs"] = self._logprobs(parts, 0)
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return self._object(kind, choices) | {"usage": self.usage(), "tunesmith": self.measured()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream: who speaks, for each choice of a chat."""
        if not self._chat:
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}, None, None) for index in range(len(self.rows))]

    def chunk(self, piece: Piece, seen: int) -> dict[str, Any]:
        """One piece of a stream; `seen`: characters of this choice's text sent before."""
        logprobs = None
        if self.ask.top_logprobs_wanted() is not None and piece.tokens:
            logprobs = self._logprobs([piece], seen)
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        return self._chunk(piece.index, delta if self._chat else {"text": piece.text}, logprobs, piece.finish)

    def closing(self) -> dict[str, Any]:
        """The chunk of usage that a client asked for, after all choices."""
        return self._object("chat.completion.chunk" if self._chat else "text_completion", []) | {
            "usage": self.usage(),
            "tunesmith": self.measured(),
        }

    def usage(self) -> dict[str, int]:
        # Choices of one prompt stand side by side, and their prompt counts once, as with OpenAI.
        prompt = sum(len(row.request.prompt) for row in self.rows[:: self.ask.n])
        completion = sum(len(row.tokens) for row in self.rows)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def measured(self) -> dict[str, float | None]:
        """Our own field: this request's share of the engine's busy time, its wait (what it was set aside for included),
        its first token, and how sure the model was (mean natural log-probability of the tokens)."""
        logprobs = [logprob for row in self.rows for logprob in row.logprobs]
        mean = sum(logprobs) / len(logprobs) if logprobs else math.nan
        return {
            "engine_seconds": round(sum(row.engine_seconds for row in self.rows), 6),
            "queue_ms": round(max((row.joined_at - row.created_at + row.aside_seconds) * 1000 for row in self.rows), 3),
            "ttft_ms": round(min((row.first_at - row.created_at) * 1000 for row in self.rows), 3),
            "mean_logprob": mean if math.isfinite(mean) else None,
        }

    def _chunk(
        self, index: int, delta: Mapping[str, Any], logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"delta": delta} if self._chat else delta
        return self._object("chat.completion.chunk" if self._chat else "text_completion", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model, "choices": choices}

    def _logprobs(self, pieces: Iterable[Piece], seen: int) -> dict[str, Any]:
        tokens = [
            (token, logprob, piece.tops[i] if piece.tops else [])
            for piece in pieces
            for i, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True))
        ]
        if self._chat:
            return {
                "content": [
                    self._spelled(token, logprob) | {"top_logprobs": [self._spelled(t, p) for t, p in tops]}
                    for token, logprob, tops in tokens
                ]
            }
        texts = [self._text(token) for token, _, _ in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": [{self._text(t): p for t, p in tops} for _, _, tops in tokens],
            "text_offset": [seen + sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
