"""Every error a person can cause, with its exit code and HTTP status.

TunesmithError (1, 500)      failed
├── StoreError (1, 500)      the artifacts cannot be written; StoreFull: their disk takes no more
├── UsageError (2, 400)      wrong arguments, names or values
├── ConfigError (2, 400)     a file with problems, all reported at once
├── Refused (3, 409)         a gate or a guard said no
├── Conflict (4, 412)        someone changed it first
├── NotFound (5, 404)        no such model, version, study, key
└── Unreachable (6, 503)     a service does not answer

The message is one sentence that says what is wrong and where; the hint says what to do next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

_WORD, _LINE, _PROBLEMS = 200, 2000, 50


def shorten(text: str) -> str:
    """A message that quotes what people wrote without pouring it out: words are cut after _WORD characters, lines
    after _LINE."""
    text = re.sub(rf"(\S{{{_WORD}}})\S+", r"\1...", text)
    return "\n".join(line if len(line) <= _LINE else line[:_LINE] + "..." for line in text.split("\n"))


class TunesmithError(Exception):
    """Something failed. Shown as one sentence and a hint, never as a traceback."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        self.message = shorten(message)
        super().__init__(self.message)
        self.hint = hint
        self.details = dict(details or {})

    def as_json(self) -> dict[str, Any]:
        """The contract's error object: ``{"error": {"code", "message", "hint", ...details}}``."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint, **self.details}}


class StoreError(TunesmithError):
    """The artifacts cannot be written, whatever is to be; nothing half-written is left."""


class StoreFull(StoreError):
    """Their disk takes no more."""


class UsageError(TunesmithError):
    """Wrong arguments, names or values."""

    exit_code = 2
    http_status = 400
    code = "usage"


class ConfigError(TunesmithError):
    """A file of the user's is wrong; the message lists every problem with file, line and field, the first fifty of
    many."""

    exit_code = 2
    http_status = 400
    code = "config"

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        title, *problems = message.split("\n")
        if (more := len(problems) - _PROBLEMS) > 0:
            problems[_PROBLEMS:] = [f"  and {more} more"]
        super().__init__("\n".join([title, *problems]), hint=hint, details=details)
        if "problems" in self.details:
            self.details["problems"] = [
                {key: shorten(value) if isinstance(value, str) else value for key, value in problem.items()}
                for problem in self.details["problems"][:_PROBLEMS]
            ]


class Refused(TunesmithError):
    """A gate or a guard said no; nothing was changed."""

    exit_code = 3
    http_status = 409
    code = "refused"


class Conflict(TunesmithError):
    """Someone else changed it first; nothing was changed."""

    exit_code = 4
    http_status = 412
    code = "conflict"


class NotFound(TunesmithError):
    """No such model, version, study, run or key."""

    exit_code = 5
    http_status = 404
    code = "not_found"


class NoModel(NotFound):
    """A request to a model that does not exist, or does not serve; the code is OpenAI's."""

    code = "model_not_found"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, details={"param": "model"})


class Unreachable(TunesmithError):
    """A service that is needed does not answer."""

    exit_code = 6
    http_status = 503
    code = "unreachable"
