"""Errors as HTTP answers: the contract's object for programs, a small page for browsers."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from deploy.auth import error_json
from infra.errors import NotFound, TunesmithError, UsageError

# Whoever mounts the console has its style sheet; without it the page is bare but whole.
_PAGE = (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    "<meta name='color-scheme' content='light dark'><title>{status} · Tunesmith</title>"
    "<script src='/static/theme.js'></script><link rel='stylesheet' href='/static/console.css'></head>"
    "<body><main><div class='card'><div class='empty'>{body}</div></div></main></body></html>"
)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON with RFC 3339 UTC times."""
    data = orjson.dumps(value, option=orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z, default=str)
    return Response(data, status, headers, "application/json")


async def explain(request: Request, error: Exception) -> Response:
    """Exception handler for TunesmithError and HTTPException."""
    headers: dict[str, str] = {}
    if isinstance(error.__cause__, TunesmithError):  # FastAPI puts its own over what reading a body raises
        error = error.__cause__
    if isinstance(error, HTTPException):
        status, headers = error.status_code, dict(error.headers or {})
        said: TunesmithError = (
            NotFound("There is nothing at this address.") if status == 404 else UsageError(f"{error.detail}.")
        )
    else:
        said = error if isinstance(error, TunesmithError) else TunesmithError("Something failed.")
        status = said.http_status
    if "text/html" in request.headers.get("accept", ""):
        from markupsafe import escape

        hint = f"<p>{escape(said.hint)}</p>" if said.hint else ""
        said_so = (
            f"<h1>{status}</h1><p>{escape(said.message)}</p>{hint}<p><a class='button' href='/'>To the models</a></p>"
        )
        return HTMLResponse(_PAGE.format(status=status, body=said_so), status, headers)
    return json_response(error_json(said), status, headers)


async def crashed(request: Request, error: Exception) -> Response:
    """Exception handler for everything that nobody foresaw; says nothing of its inside."""
    return await explain(request, TunesmithError("Something failed here.", hint="The gateway's log has the details."))
