"""Upstreams: OpenAI-shaped addresses by name, at which hosted models answer.

A version names an upstream and a model there, never an address or a key, so that who brings a bundle cannot say where
requests and keys go. A key stands in an environment variable of whatever asks, which is named here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from infra.db import Connection, load_queries
from infra.errors import NotFound, Refused, UsageError

if TYPE_CHECKING:
    from registry.bundle import Hosted

SQL = load_queries(Path(__file__).with_suffix(".sql"))
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """``POST <url>/chat/completions`` answers there as OpenAI's does, within `timeout_seconds`."""

    name: str
    url: str
    key_env: str | None
    timeout_seconds: float = 60.0


def check_url(value: str) -> str:
    """The address as it is used, without a slash at the end. Raises ValueError, which never quotes what was given: it
    may hold a secret."""
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or not value.isprintable() or " " in value:
        raise ValueError("is no address; write it as https://api.example.org/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError("holds more than an address; put the key into a variable and name that in key_env")
    return value.rstrip("/").removesuffix("/chat/completions")


def check_variable(value: str) -> str:
    """The name of an environment variable. Raises ValueError, which does not quote it either."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", value):
        raise ValueError("must be the name of an environment variable, such as JUDGE_KEY, never the key itself")
    return value


def check_options(value: dict[str, Any]) -> dict[str, Any]:
    """Fields of requests that a file or a bundle may set. Raises ValueError."""
    if taken := sorted(value.keys() & {"model", "messages", "prompt", "stream", "stream_options", "n"}):
        raise ValueError(f"cannot set {taken[0]}; leave it out")
    return value


def read_key(variable: str | None) -> str | None:
    """The key in a variable of this process's environment; None where none is needed. Raises ValueError, a part of a
    sentence, where it holds none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the environment variable {variable} holds no key")
    if not key.isascii() or not key.isprintable():  # else an HTTP library's own error would quote it
        raise ValueError(f"the environment variable {variable} holds characters that no key has")
    return key


def put(
    conn: Connection,
    name: str,
    url: str,
    *,
    key_env: str | None = None,
    timeout_seconds: float | None = None,
    actor: str,
) -> None:
    """Name an address, or move a name to another one; gateways follow within seconds. What is None stays as it is, an
    empty `key_env` is none. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!a} is no upstream's name.", hint="It has 1 to 63 characters a-z, 0-9 and -.")
    try:
        values = {"name": name, "url": check_url(url), "key_env": check_variable(key_env) if key_env else key_env}
    except ValueError as error:
        raise UsageError(f"What was given for the upstream {name} {error}.") from None
    conn.execute(SQL["put"], values | {"timeout_seconds": timeout_seconds, "actor": actor})


def remove(conn: Connection, name: str) -> None:
    """Forget a name. Raises NotFound, Refused while a version that serves, served or is tried out is asked there: one
    could roll back to it."""
    if row := conn.execute(SQL["in_use"], {"name": name}).fetchone():
        raise Refused(
            f"{row['model']}:{row['number']} serves, served or is tried out, and is asked at {name[:80]!a}.",
            hint="Give the name another address: tunesmith upstream set NAME --url URL.",
        )
    if conn.execute(SQL["remove"], {"name": name}).rowcount == 0:
        raise _unknown(name)


def get(conn: Connection, name: str) -> Upstream:
    """Raises NotFound."""
    row = conn.execute(SQL["get"], {"name": name}).fetchone()
    if row is None:
        raise _unknown(name)
    return Upstream(**row)


def every(conn: Connection) -> dict[str, Upstream]:
    return {row["name"]: Upstream(**row) for row in conn.execute(SQL["all"])}


def listing(conn: Connection) -> list[dict[str, Any]]:
    """name, url, key_env, timeout_seconds, actor, at, and the models with a version in a slot that is asked there."""
    return list(conn.execute(SQL["listing"]))


def check(conn: Connection, hosted: Hosted) -> None:
    """Raises NotFound where a version would be asked at an upstream that has no address here."""
    for each in hosted.models:
        get(conn, each.upstream)


def _unknown(name: str) -> NotFound:
    return NotFound(
        f"There is no upstream {name[:80]!a}.", hint="Name its address: tunesmith upstream set NAME --url URL."
    )
