"""Prefect's API over plain HTTP, for all but the flows themselves: one call, with its credentials and its errors."""

from __future__ import annotations

import base64
import http.client
import json
import os
from typing import Any

from infra import web
from infra.errors import NotFound, Unreachable, UsageError
from infra.settings import Settings, get_settings


def call(method: str, path: str, body: Any = None, *, settings: Settings | None = None, seconds: float = 20) -> Any:
    """One call of Prefect's API; returns its JSON, or None for an empty answer.

    It is signed as Prefect's own client does: with ``PREFECT_API_AUTH_STRING`` (user:password), else with
    ``PREFECT_API_KEY``. Raises NotFound on 404, UsageError on other refusals with Prefect's own words, Unreachable
    when it is away or broken.
    """
    url = (settings or get_settings()).need("prefect_url").rstrip("/")
    try:
        status, text = web.ask(method, f"{url}{path}", body, headers=_credentials(), seconds=seconds)
        if status < 400:
            return json.loads(text) if text else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"Prefect's server does not answer at {url}.", hint="See `tunesmith status`.") from error
    if status == 404:
        raise NotFound(f"Prefect knows no {path.strip('/')}.")
    if status >= 500:
        raise Unreachable(f"Prefect answered {status} to {path}.", hint="See `tunesmith status`.")
    hint = "Set PREFECT_API_KEY, or PREFECT_API_AUTH_STRING, as that server wants it." if status in (401, 403) else ""
    raise UsageError(f"Prefect refused {path}: {text.decode(errors='replace')[:300]}", hint=hint)


def _credentials() -> dict[str, str]:
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"authorization": f"Bearer {key}"}
    return {}
