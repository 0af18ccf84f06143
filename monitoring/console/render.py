"""One visit to a page: who comes, what was asked, and how the answer is drawn."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from deploy.auth import Identity, NotAuthenticated, Role, require
from infra.db import load_queries, transaction
from infra.errors import NotFound, TunesmithError, UsageError
from monitoring import alerts, attribution, figures

SQL = load_queries(Path(__file__).with_name("queries.sql"))
log = logging.getLogger(__name__)

RANGES: Mapping[str, timedelta] = {
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
}


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A request to a page. `form` holds what was posted; `live` asks for the page's live part alone."""

    request: Request
    identity: Identity | None
    form: Mapping[str, str] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return self.request.headers.get("x-live") == "1"

    @property
    def actor(self) -> str:
        if self.identity is None:
            raise NotAuthenticated("A key is needed.", hint="Log in.")
        return self.identity.actor

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])

    def query(self, name: str, default: str = "") -> str:
        return self.request.query_params.get(name, default).strip()

    def since(self, default: str = "24h") -> str:
        """The range asked for, one of RANGES."""
        asked = self.query("since", default)
        return asked if asked in RANGES else default

    def allows(self, role: Role) -> bool:
        return self.identity is not None and self.identity.may(role)


Handler = Callable[[Visit], Response]
_HEADINGS = {
    400: "That cannot be read",
    403: "Not with this key",
    404: "Not found",
    409: "Refused",
    412: "Someone was faster",
    413: "Too long",
    503: "A service does not answer",
}


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (
        *(figures.number, figures.milliseconds, figures.seconds, figures.usd, figures.percent, figures.signed),
        *(figures.metric, figures.words, figures.stamp, figures.ago, figures.digest, figures.plural, figures.marked),
        figures.actor,
    ):
        env.filters[write.__name__] = write
    env.globals.update(
        {
            "RANGES": tuple(RANGES),
            "DASH": figures.DASH,
            "CAUSES": attribution.LABELS,
            "alert_title": alerts.title,
            "alert_said": alerts.said,
        }
    )
    env.globals["parts"] = env.get_template("parts.html").module
    return env


def draw(visit: Visit, template: str, status: int = 200, **context: Any) -> Response:
    """A page as HTML, or only its live part when that was asked for."""
    context = {
        "visit": visit,
        "identity": visit.identity,
        "may_change": visit.allows("operator"),
        "may_ask": visit.allows("service"),
        "path": visit.request.url.path,
        **context,
    }
    page = _environment().get_template(template)
    context["has_live"] = "live" in page.blocks
    if visit.live and context["has_live"]:
        return HTMLResponse("".join(page.blocks["live"](page.new_context(context))), status)
    if "open_alerts" not in context:
        context["open_alerts"] = _open_alerts() if visit.identity else 0
    return HTMLResponse(page.render(context), status)


def _open_alerts() -> int:
    try:
        with transaction() as conn:
            row = conn.execute(SQL["open_alerts"]).fetchone()
        return int(row["open"]) if row else 0
    except TunesmithError:
        return 0


def page(handler: Handler, role: Role = "viewer") -> Callable[[Request], Awaitable[Response]]:
    """An endpoint: checks who asks, reads the form, runs the handler in a thread and shows its errors as a page."""

    @functools.wraps(handler)
    async def endpoint(request: Request) -> Response:
        visit = Visit(request=request, identity=None)
        try:
            visit = Visit(request=request, identity=require(request, "viewer"))
            require(request, role)
            if request.method == "POST":
                visit = Visit(request=request, identity=visit.identity, form=await read_form(request))
            return await run_in_threadpool(handler, visit)
        except NotAuthenticated:
            return RedirectResponse("/login", 303)
        except TunesmithError as error:
            return await run_in_threadpool(problem, visit, error)

    return endpoint


async def read_form(request: Request) -> dict[str, str]:
    """The posted fields; that they come from a page of ours is what `deploy.auth.Guard` sees to."""
    try:
        async with request.form(max_files=0, max_fields=30) as form:
            found = {name: value for name, value in form.items() if isinstance(value, str)}
    except HTTPException as error:
        raise UsageError(f"The form cannot be read: {error.detail}") from error
    if any("\0" in value for value in found.values()):
        raise UsageError("The form holds a NUL character.")
    return found


def problem(visit: Visit, error: TunesmithError) -> Response:
    """An error of a person's as a page that says what to do."""
    heading = _HEADINGS.get(error.http_status, "That failed")
    return draw(visit, "problem.html", error.http_status, error=error, heading=heading, open_alerts=0)


def whole(text: str, what: str) -> int:
    """A version's number from a path or a form. Raises NotFound."""
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise NotFound(f"There is no {what} {text[:40]!r}.")
    return int(text)
