"""Notifications: a webhook, signed, and Slack are told of every change of a deployment and of alerts, at least once
and in order.

The form is that of Standard Webhooks (github.com/standard-webhooks/standard-webhooks): ``webhook-id``,
``webhook-timestamp`` (Unix seconds) and ``webhook-signature: v1,<base64 of HMAC-SHA-256 over "id.timestamp.body">``.
What is told of a change is the ledger's entry, so a receiver can check the chain; a repeated message has the same id.
Slack, and whatever takes its incoming webhooks' form, gets ``{"text"}``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import orjson
from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries
from infra.errors import Refused, TunesmithError, Unreachable
from infra.settings import get_settings
from registry.deployments import Entry

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)
Target = Literal["webhook", "slack"]

_SECONDS = 4.0  # for one answer, and for all of a turn's to begin: the watcher has more to do
_ATTEMPTS = 60  # at most five minutes apart: about five hours


def enqueue(conn: Connection, model: str, name: str, body: Mapping[str, Any]) -> None:
    """Have a message of this id told once the transaction is committed: ``{"type", "timestamp", "data"}``."""
    text = orjson.dumps(body, option=orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC, default=str)
    conn.execute(SQL["enqueue"], {"model": model, "name": name, "message": Jsonb(orjson.loads(text))})


def deliver(conn: Connection, limit: int = 20) -> int:
    """Tell the webhook, and Slack, what waits for each, oldest first; returns how many were taken (answered 2xx).

    The first that fails keeps its place, and all for that address are tried again after 1, 2, 4 ... 300 seconds; after
    `_ATTEMPTS` it is given up, with a line in the log. Nothing is raised for it. Without an address nobody is told. An
    address that is slow to answer has the rest at the next call.
    """
    settings = get_settings()
    urls: dict[Target, str | None] = {"webhook": settings.webhook_url, "slack": settings.slack_url}
    return sum(_deliver(conn, target, url, limit) for target, url in urls.items())


def _deliver(conn: Connection, target: Target, url: str | None, limit: int) -> int:
    if url is None:
        conn.execute(SQL["nobody"], {"target": target})
        return 0
    taken, until = 0, time.monotonic() + _SECONDS
    for row in conn.execute(SQL["open"], {"limit": limit, "target": target}).fetchall():
        if time.monotonic() > until:
            break
        number, attempts, name, body = (row.pop(column) for column in ("id", "attempts", "name", "message"))
        if body is None:
            name, body = f"ledger-{row['model']}-{row['generation']}", message(Entry(**row))
        try:
            if target == "slack":
                send(url, {"text": in_words(body)})
            else:
                send(url, body, sign_as=name)
        except (TunesmithError, ValueError, OSError) as error:  # an address may be wrong in many ways
            told = {"id": number, "target": target, "error": str(error)[:1000]}
            told["seconds"] = min(300.0, 2.0 ** min(attempts, 9))
            if attempts + 1 >= _ATTEMPTS:
                log.error("the %s was never told of %s: %s", target, name, error)
                conn.execute(SQL["give_up"], told)
                continue
            log.warning("notifications wait %.0f s: %s", told["seconds"], error)
            conn.execute(SQL["postpone"], told)
            break
        conn.execute(SQL["done"], {"id": number})
        taken += 1
    return taken


def drop_old(conn: Connection, days: int) -> None:
    """Forget what was told more than `days` days ago."""
    conn.execute(SQL["drop_old"], {"days": days})


def message(entry: Entry) -> dict[str, Any]:
    """``{"type": "deployment.changed", "timestamp", "data": <the ledger's entry>}``."""
    body = entry.to_json()
    return {"type": "deployment.changed", "timestamp": body["at"], "data": body}


def in_words(body: Mapping[str, Any]) -> str:
    """A message as a line for people, in Slack's own mark-up, with a link to the page that explains it."""
    data = body["data"]
    if body["type"] == "deployment.changed":
        share = f" {100 * data['share']:g} %" if data["share"] is not None else ""
        forced = ", forced" if data["forced"] else ""
        what = f"{data['action']}{share}: {data['slot']} {data['from'] or 'none'} -> {data['to'] or 'none'}{forced}"
        text = f"{data['model']}: {what}, by {data['actor']}" + (f": {data['reason']}" if data["reason"] else "")
        return _escaped(text) + _link(page(f"/models/{data['model']}"), "the model")
    over = " is over" if body["type"] == "alert.closed" else ""
    severity, title = data["severity"].upper(), data.get("title", data["rule"])
    cause = f" (cause: {data['cause']})" if data.get("cause") else ""
    text = f"*{severity}*{over}: {_escaped(title)}{cause}. {_escaped(data['message'])}"
    return text + _link(data["url"], "what happened")


def page(path: str) -> str | None:
    """The address of a page of the console, as people reach it, as far as this process knows."""
    settings = get_settings()
    url = settings.public_url or settings.gateway_url
    return f"{url.rstrip('/')}{path}" if url else None


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _link(url: str | None, words: str) -> str:
    return f" <{url}|{words}>" if url else ""


def send(url: str, body: Mapping[str, Any], *, sign_as: str | None = None) -> None:
    """POST a message, signed under an id where one is given. Follows no redirect and goes through no proxy.

    Raises Refused for an address that is not allowed (before anything is sent), Unreachable when there is no answer,
    TunesmithError for an answer other than 2xx.
    """
    settings = get_settings()
    text, now = orjson.dumps(body, option=orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC), str(int(time.time()))
    head = {"content-type": "application/json", "user-agent": "tunesmith"}
    if sign_as is not None:
        if settings.webhook_secret is None:
            raise Refused("TUNESMITH_WEBHOOK_URL is set, but TUNESMITH_WEBHOOK_SECRET is not.", hint="Set both.")
        secret = settings.webhook_secret.get_secret_value()
        head |= {
            "webhook-id": sign_as,
            "webhook-timestamp": now,
            "webhook-signature": signature(secret, sign_as, now, text),
        }
    parts = urlsplit(url)
    address = _checked(parts, private=settings.allow_private_webhooks)
    connection = _connected(parts, address)
    try:
        connection.request("POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), text, head)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"The webhook at {parts.hostname} does not answer ({type(error).__name__}).") from error
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise TunesmithError(f"The webhook at {parts.hostname} answered {status}.")


def signature(secret: str, name: str, timestamp: str, body: bytes) -> str:
    """``v1,<base64>``; a secret that begins with ``whsec_`` is base64, any other is its UTF-8."""
    plain = secret.removeprefix("whsec_")
    key = base64.b64decode(plain) if plain != secret else secret.encode()
    made = hmac.new(key, b".".join([name.encode(), timestamp.encode(), body]), hashlib.sha256).digest()
    return "v1," + base64.b64encode(made).decode()


def _checked(parts: SplitResult, *, private: bool) -> tuple[str, int]:
    """The address to connect to. It is looked up once, so that a name cannot mean another one a moment later."""
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"The webhook's host {host} is not known.") from error
    for text in found:
        if not private and not _public(text):
            raise Refused(
                f"The webhook at {host} is not told: {text} is a private or reserved address.",
                hint="TUNESMITH_ALLOW_PRIVATE_WEBHOOKS=true allows it.",
            )
    return found[0], port


def _public(text: str) -> bool:
    """Whether an address is anybody's on the internet, and not this network's, this machine's or a cloud's metadata
    service; an IPv6 address that stands for an IPv4 one (mapped, 6to4, NAT64, Teredo) is judged as that one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _public(str(inner))
    return address.is_global and not address.is_multicast


def _connected(parts: SplitResult, address: tuple[str, int]) -> http.client.HTTPConnection:
    host = parts.hostname or ""
    try:
        plain = socket.create_connection(address, timeout=_SECONDS)
        if parts.scheme != "https":
            connection = http.client.HTTPConnection(host, address[1], timeout=_SECONDS)
            connection.sock = plain
            return connection
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, address[1], timeout=_SECONDS, context=context)
        connection.sock = context.wrap_socket(plain, server_hostname=host)
        return connection
    except OSError as error:
        raise Unreachable(f"The webhook at {host} does not answer ({type(error).__name__}).") from error
