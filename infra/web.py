"""Short questions over plain HTTP; those to this machine never go through a proxy."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_USUAL = urllib.request.build_opener()


def answers(url: str, *, seconds: float = 2) -> bool:
    """Whether a GET is answered with a 2xx."""
    try:
        with _opener(url).open(url, timeout=seconds) as response:
            return bool(200 <= response.status < 300)
    except (OSError, HTTPException, ValueError):
        return False


def post(url: str, body: Any, *, headers: Mapping[str, str] | None = None, seconds: float = 10) -> Any:
    """The JSON answer to a JSON body. Raises OSError (its subclasses for no connection and for status codes), also
    when what answers speaks no HTTP or no JSON."""
    head = {"content-type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, json.dumps(body).encode(), head)  # noqa: S310 - a server that settings name
    try:
        with _opener(url).open(request, timeout=seconds) as response:
            return json.load(response)
    except (HTTPException, ValueError) as error:
        raise OSError(f"{url} gives no answer that can be read: {type(error).__name__}: {error}") from error


def ask(
    method: str, url: str, body: Any = None, *, headers: Mapping[str, str] | None = None, seconds: float = 10
) -> tuple[int, bytes]:
    """The status and content of an answer, whatever the status; `body` goes out as JSON. Raises OSError or
    http.client.HTTPException when none comes."""
    data = None if body is None else json.dumps(body).encode()
    head = {"content-type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, head, method=method)  # noqa: S310 - a server that settings name
    try:
        with _opener(url).open(request, timeout=seconds) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def on_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _opener(url: str) -> urllib.request.OpenerDirector:
    return _DIRECT if on_loopback(url) else _USUAL


def retry_after(asked: str, otherwise: float) -> float:
    """The seconds of a Retry-After header (RFC 9110, section 10.2.3: a number, or a date); `otherwise` where it says
    nothing that can be read."""
    try:
        seconds = float(asked)
        return max(0.0, seconds) if math.isfinite(seconds) else otherwise
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(asked)
    except ValueError:
        return otherwise
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
