"""Files of examples as chat messages: JSONL (chat, prompt/completion, Alpaca, ShareGPT) and CSV.

Read as a stream, a bounded line at a time, so that no file is too large. A row that cannot be used is not an
error but a `Bad`, with its line and the reason.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from registry.datasets import Message

MOST_LINE_BYTES = 1_000_000
_KEPT_TEXT = 2_000  # characters of a bad row that its quarantine entry shows
_CHAT_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Good:
    """One usable row, the line it begins at, and the form it was written in."""

    line: int
    form: str
    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One row that was refused. `text` is its beginning, undecodable bytes escaped."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the first rows of a file look like."""

    form: str
    good: int
    bad: list[Bad]


def read(path: Path) -> Iterator[Good | Bad]:
    """The rows of a .jsonl, .ndjson or .csv file, in order. Blank lines are no rows."""
    with path.open("rb") as file:
        yield from (_csv(file) if path.suffix.lower() == ".csv" else _jsonl(file))


def peek(path: Path, rows: int = 50) -> Head:
    """Look at the first rows only."""
    good: list[Good] = []
    bad: list[Bad] = []
    for number, row in enumerate(read(path)):
        if number == rows:
            break
        if isinstance(row, Bad):
            bad.append(row)
        else:
            good.append(row)
    if not good and not bad:
        bad.append(Bad(line=1, reason="there are no rows in the file", text=""))
    return Head(form=good[0].form if good else "unknown", good=len(good), bad=bad)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Line number, bytes, and whether the line was too long and only its beginning is given."""
    number = 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        long = len(line) > MOST_LINE_BYTES
        rest = line
        while long and rest and not rest.endswith(b"\n"):
            rest = file.readline(MOST_LINE_BYTES)  # passed over in pieces, never held whole
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, long


def _jsonl(file: BinaryIO) -> Iterator[Good | Bad]:
    for number, line, long in _lines(file):
        if not line.strip() and not long:
            continue
        try:
            if long:
                raise ValueError(f"the line is longer than {MOST_LINE_BYTES:,} bytes; shorten the row")
            form, messages = _row(_json(line))
        except ValueError as error:
            yield _bad(number, str(error), line)
        else:
            yield Good(line=number, form=form, messages=messages)


def _json(line: bytes) -> Any:
    if b"\0" in line:
        raise ValueError("holds a NUL byte; the file may be damaged, or UTF-16: save it as UTF-8")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if "surrogate" in error.msg:
            raise ValueError(f"holds half of a surrogate pair at column {error.colno}: no character") from error
        raise ValueError(f"is not JSON: {error.msg.split(':')[0]} at column {error.colno}") from error


def _csv(file: BinaryIO) -> Iterator[Good | Bad]:
    """A header, then one row a record; a quoted field may span lines. `Bad` lines are where a record began."""
    refused: list[Bad] = []
    begins = 0  # the line at which the record began; 0 between records

    def text() -> Iterator[str]:
        nonlocal begins
        for number, line, long in _lines(file):
            if long:
                reason = f"the line is longer than {MOST_LINE_BYTES:,} bytes; shorten the row"
                refused.append(_bad(number, reason, line))
                continue
            try:
                decoded = line.decode()
            except UnicodeDecodeError as error:
                refused.append(_bad(number, f"is not UTF-8 at byte {error.start + 1}; save the file as UTF-8", line))
                continue
            begins = begins or number
            yield decoded

    csv.field_size_limit(MOST_LINE_BYTES)
    records = csv.reader(text(), strict=True)
    header: list[str] | None = None
    while True:
        begins, record, wrong = 0, None, ""
        try:
            record = next(records, None)
        except csv.Error as error:
            wrong = f"is not CSV: {error}"
        yield from refused
        refused.clear()
        if wrong:
            yield _bad(begins, wrong, b"")
            continue
        if record is None:
            return
        if not any(field.strip() for field in record):
            continue
        if header is None:
            header = [name.strip().lower() for name in record]
            continue
        try:
            if len(record) != len(header):
                raise ValueError(f"has {len(record)} fields, the header has {len(header)}")
            form, messages = _row(dict(zip(header, record, strict=True)))
        except ValueError as error:
            yield _bad(begins, str(error), ",".join(record).encode("utf-8", "backslashreplace"))
        else:
            yield Good(line=begins, form=f"csv {form}", messages=messages)


def _bad(line: int, reason: str, raw: bytes) -> Bad:
    shown = raw[: _KEPT_TEXT * 4].decode("utf-8", "backslashreplace")[:_KEPT_TEXT]
    return Bad(line=line, reason=reason, text=shown.rstrip("\r\n").replace("\0", "\\0"))


def _row(value: Any) -> tuple[str, tuple[Message, ...]]:
    """The form's name and the messages. Raises ValueError with the reason why it is no row."""
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    if "messages" in value:
        return "chat", _chat(value["messages"], "role", "content", _CHAT_ROLES)
    if "conversations" in value:
        messages = value["conversations"]
        if isinstance(messages, list) and isinstance(value.get("system"), str) and value["system"].strip():
            messages = [{"from": "system", "value": value["system"]}, *messages]
        return "sharegpt", _chat(messages, "from", "value", _SHAREGPT_ROLES)
    if "chosen" in value and "rejected" in value:
        raise ValueError("is a preference pair, which no method built so far trains on; give prompt and completion")
    if "prompt" in value and "completion" in value:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return "prompt/completion", _chat([*prompt, *completion], "role", "content", _CHAT_ROLES)
        system = {"role": "system", "content": value["system"]} if value.get("system") else None
        return "prompt/completion", _pair("prompt", prompt, "completion", completion, system)
    if "instruction" in value and "output" in value:
        asked = value["instruction"]
        if isinstance(asked, str) and isinstance(value.get("input"), str) and value["input"].strip():
            asked = f"{asked.strip()}\n\n{value['input']}"
        return "alpaca", _pair("instruction", asked, "output", value["output"], None)
    keys = ", ".join(sorted(map(str, value))[:8]) or "none"
    raise ValueError(
        f"has no known form; wanted: messages, conversations, prompt and completion, or instruction and output "
        f"(it has {keys})"
    )


def _pair(
    asked_name: str, asked: Any, answer_name: str, answer: Any, system: Mapping[str, Any] | None
) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    for name, text in ((asked_name, asked), (answer_name, answer)):
        if not isinstance(text, str):
            raise ValueError(f"{name} is not text")
        if not text.strip():
            raise ValueError(f"{name} is empty")
    return _chat([*([system] if system else []), *turns], "role", "content", _CHAT_ROLES)


def _chat(turns: Any, role_key: str, text_key: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("has no messages")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"message {number} is not an object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"message {number} has the {role_key} {role!r}; known are {', '.join(roles)}")
        if not isinstance(text, str):
            raise ValueError(f"message {number} has no text in {text_key}")
        if not text.strip():
            raise ValueError(f"message {number} ({roles[role]}) is empty")
        if "\0" in text:
            raise ValueError(f"message {number} holds a NUL character")
        messages.append(Message(role=roles[role], content=text.strip()))
    _order(messages)
    return tuple(messages)


def _order(messages: Iterable[Message]) -> None:
    """An optional system message, then user and assistant by turns, the assistant last."""
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if roles[-1] != "assistant":
        raise ValueError(f"ends with the {roles[-1]}'s message; the assistant's must be last")
    for number, role in enumerate(turns):
        wanted = "assistant" if number % 2 else "user"
        if role != wanted:
            at = number + 1 + len(roles) - len(turns)
            raise ValueError(f"message {at} is the {role}'s where the {wanted}'s should be")
