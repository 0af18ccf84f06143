"""OpenAI's request and answer shapes: strict checks of what comes in, and what goes out in our name.

Known fields are checked by hand, since this is the hot path; unknown ones are passed on to the engine, which
says itself what it cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from deploy.routing import Served
from infra.errors import UsageError

Kind = Literal["chat", "completion"]
MAX_N = 8
MAX_TOKENS = 131_072
MAX_MESSAGES = 2048
BACKGROUND = 1  # priority of what nobody waits for, as copies: engines serve 0, all else, before it
# To hosted models: what says what to answer, and not who answers, from what, and at which price
_PASSED_ON = frozenset({
    "messages", "prompt", "suffix", "max_tokens", "stop", "n", "stream", "seed", "temperature", "top_p", "top_k",
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "top_logprobs",
    "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "response_format",
    "reasoning_effort", "verbosity", "priority",
})  # fmt: skip
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class BadRequest(UsageError):
    """A request that is not OpenAI's shape, or out of bounds; `param` names the field."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, details={"param": param})


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A checked request. `body` is what goes to the engine but for the model; nulls are dropped."""

    kind: Kind
    model: object
    user: str | None
    stream: bool
    wants_usage: bool
    body: dict[str, Any]
    newer: bool = False  # whether it names its length max_completion_tokens, as models that reason insist on

    @property
    def background(self) -> bool:
        """Whether it makes way for others in an engine."""
        return bool(self.body.get("priority", 0))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was asked as chat messages, for features."""
        if self.kind == "chat":
            messages: list[dict[str, Any]] = self.body["messages"]
            return messages
        prompt = self.body["prompt"]
        several = prompt if isinstance(prompt, list) else [prompt]
        # Of prompts that came as tokens the text is not known
        return [{"role": "user", "content": text if isinstance(text, str) else ""} for text in several]


def parse_request(kind: Kind, raw: bytes) -> Asked:
    """Check a request's bytes. Raises BadRequest, naming the field."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    body = {name: item for name, item in value.items() if item is not None}
    if "model" not in body:
        raise BadRequest("`model` is missing.", "model")
    for name, check in _CHECKS.items():
        if name in body:
            check(name, body[name])
    if kind == "chat":
        body["messages"] = [_message(index, item) for index, item in enumerate(_messages(body))]
        if isinstance(body.get("logprobs", False), int) and not isinstance(body.get("logprobs", False), bool):
            raise BadRequest("`logprobs` must be true or false.", "logprobs")
        if newer := "max_completion_tokens" in body:
            body["max_tokens"] = body.pop("max_completion_tokens")
    else:
        newer = False
        body["prompt"] = _prompt(body)
    options = body.pop("stream_options", {})
    stream = body.get("stream", False)
    if "safety_identifier" in body:  # OpenAI's newer name of the same
        body.setdefault("user", body.pop("safety_identifier"))
    # Between the client and OpenAI's own platform
    for name in ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"):
        body.pop(name, None)
    return Asked(
        kind=kind,
        model=body.pop("model"),
        user=body.pop("user", None),
        stream=stream,
        wants_usage=bool(options.get("include_usage", False)),
        body=body,
        newer=newer,
    )


def for_engine(asked: Asked, served: Served) -> dict[str, Any]:
    """The engine's body: the version's prompt and generation defaults where the request says nothing. Raises BadRequest
    for a field that is not passed on to a hosted model, whose key and bill are not the client's."""
    if served.hosted:
        own = {name for each in served.hosted.models for name in each.options}
        for name in asked.body:
            if name not in _PASSED_ON and name not in own:
                raise BadRequest(f"`{name}` is not passed on to the hosted models of {served.model}.", name)
    body = {**served.generation, **asked.body}
    if (
        asked.kind == "chat"
        and served.system
        and all(m["role"] not in ("system", "developer") for m in body["messages"])
    ):
        body["messages"] = [{"role": "system", "content": served.system}, *body["messages"]]
    if asked.newer and served.hosted:
        body["max_completion_tokens"] = body.pop("max_tokens")
    if asked.stream:
        body["stream_options"] = {"include_usage": True}
    return body


# ---------------------------------------------------------------- checks


def _integer(low: int, high: int) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadRequest(f"`{name}` must be a whole number from {low} to {high}.", name)

    return check


def _number(low: float, high: float) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise BadRequest(f"`{name}` must be a number from {low:g} to {high:g}.", name)

    return check


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise BadRequest(f"`{name}` must be true or false.", name)


def _logprobs(name: str, value: Any) -> None:
    if not isinstance(value, int) or not 0 <= value <= 20:
        raise BadRequest("`logprobs` must be true or false, for completions a whole number from 0 to 20.", name)


def _user(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 512:
        raise BadRequest(f"`{name}` must be a string of at most 512 characters.", name)


def _stop(name: str, value: Any) -> None:
    several = value if isinstance(value, list) else [value]
    if len(several) > 16 or not all(isinstance(item, str) and 0 < len(item) <= 256 for item in several):
        raise BadRequest("`stop` must be a string, or a list of at most 16, each of 1 to 256 characters.", name)


def _stream_options(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("include_usage", False), bool | None):
        raise BadRequest("`stream_options` must be an object with `include_usage` true or false.", name)


def _table(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise BadRequest(f"`{name}` must be an object.", name)


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "n": _integer(1, MAX_N),
    "max_tokens": _integer(1, MAX_TOKENS),
    "max_completion_tokens": _integer(1, MAX_TOKENS),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _integer(-(2**63), 2**63 - 1),
    "logprobs": _logprobs,
    "top_logprobs": _integer(0, 20),
    "stop": _stop,
    "stream": _boolean,
    "stream_options": _stream_options,
    "user": _user,
    "safety_identifier": _user,
    "priority": _integer(0, 1000),  # a client may stand back, never push forward
    "logit_bias": _table,
    "metadata": _table,
}


def _messages(body: Mapping[str, Any]) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"`messages` must be a list of 1 to {MAX_MESSAGES} messages.", "messages")
    return messages


def _message(index: int, value: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise BadRequest(f"`{where}` must be an object with a `role` of {', '.join(sorted(_ROLES))}.", where)
    content = value.get("content")
    if isinstance(content, str):
        return value
    if content is None and value["role"] == "assistant":
        return {**value, "content": ""}
    if isinstance(content, list) and all(_is_part(part) for part in content):
        if any(part["type"] != "text" for part in content):  # pictures and the like: the engine says if it takes them
            return value
        return {**value, "content": "".join(part["text"] for part in content)}
    raise BadRequest(f"`{where}.content` must be text, or a list of parts with a `type`.", f"{where}.content")


def _is_part(part: object) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def _prompt(body: Mapping[str, Any]) -> str | list[Any]:
    """One text, or a list of texts, or of prompts that are lists of tokens."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(map(_is_token, prompt)):
        prompt = [prompt]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt or not all(map(_is_prompt, prompt)):
        raise BadRequest("`prompt` must be a string, a list of tokens, or a list of those.", "prompt")
    if len(prompt) * body.get("n", 1) > MAX_N:
        raise BadRequest(f"A request has at most {MAX_N} answers, of all its prompts together.", "prompt")
    return prompt


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_token, value)))
