"""The console's routes, mounted at ``/`` by ``tunesmith serve`` behind the gateway's guard."""

from __future__ import annotations

from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from deploy.auth import Auth, clear_session, identify, needs, set_session
from infra.errors import TunesmithError
from monitoring.console import (
    alerting,
    changing,
    data,
    drift,
    model,
    overview,
    playground,
    requests,
    reviewing,
    runs,
    settings,
    spending,
    studies,
    version,
)
from monitoring.console.render import Visit, draw, page, problem, read_form


def console_routes() -> list[BaseRoute]:
    """All pages. The application they are mounted in has its ``deploy.auth.Auth`` as ``app.state.auth`` and stands
    behind ``deploy.auth.Guard``; each page checks the role it needs all the same."""
    return [
        Route("/login", login, methods=["GET", "POST"]),
        Route("/logout", logout, methods=["POST"]),
        Mount("/static", StaticFiles(directory=Path(__file__).with_name("static"))),
        Route("/favicon.ico", favicon),
        Route("/", page(overview.models)),
        Route("/alerts", page(alerting.listing)),
        Route("/alerts/{id}", page(alerting.show)),
        Route("/models/{model}", page(model.show)),
        Route("/models/{model}/promote/{number}", page(changing.promote_form)),
        Route("/models/{model}/promote/{number}", page(changing.promote, "operator"), methods=["POST"]),
        Route("/models/{model}/rollback", page(changing.rollback_form)),
        Route("/models/{model}/rollback", page(changing.rollback, "operator"), methods=["POST"]),
        Route("/models/{model}/rollout/{number}", page(changing.rollout_form)),
        Route("/models/{model}/rollout/{number}", page(changing.begin_rollout, "operator"), methods=["POST"]),
        Route("/models/{model}/challenger/stop", page(changing.stop_challenger, "operator"), methods=["POST"]),
        Route("/models/{model}/drift", page(drift.show)),
        Route("/models/{model}/cost", page(spending.show)),
        Route("/models/{model}/versions/{number}", page(version.show)),
        Route("/models/{model}/versions/{number}/report", page(version.report)),
        Route("/models/{model}/versions/{number}/approve", page(version.approve, "operator"), methods=["POST"]),
        Route("/requests", page(requests.listing)),
        Route("/requests/{id}", page(requests.story)),
        Route("/requests/{id}/feedback", page(reviewing.give, "operator"), methods=["POST"]),
        Route("/review", page(reviewing.queue)),
        Route("/playground", page(playground.show)),
        Route("/runs", page(runs.listing)),
        Route("/runs/{id}", page(runs.show)),
        Route("/studies", page(studies.listing)),
        Route("/studies/{name}", page(studies.show)),
        Route("/data", page(data.listing)),
        Route("/settings", page(settings.show)),
        Route("/settings/keys", page(settings.make_key, "admin"), methods=["POST"]),
        Route("/settings/keys/{id}/revoke", page(settings.end_key, "admin"), methods=["POST"]),
        Route("/links/mlflow/{run_id}", page(runs.to_mlflow)),
    ]


async def login(request: Request) -> Response:
    """The form, and the exchange of a key for a session cookie."""
    visit = Visit(request=request, identity=None)
    try:
        form = await read_form(request) if request.method == "POST" else {}
        target = _inside(form.get("next") or request.query_params.get("next") or "/")
        if request.method == "GET":
            if identify(request):
                return RedirectResponse(target, 303)
            return await run_in_threadpool(draw, visit, "login.html", error=None, next=target)
        auth: Auth = request.app.state.auth
        response = RedirectResponse(target, 303)
        set_session(response, await auth.login(form.get("key", "")), request)
        return response
    except TunesmithError as error:
        if error.http_status in (401, 403):
            target = _inside(request.query_params.get("next") or "/")
            return await run_in_threadpool(draw, visit, "login.html", error.http_status, error=error, next=target)
        return await run_in_threadpool(problem, visit, error)


@needs("viewer")
async def logout(request: Request) -> Response:
    """End the session and forget the cookie."""
    await request.app.state.auth.logout(request)
    response = RedirectResponse("/login", 303)
    clear_session(response)
    return response


async def favicon(request: Request) -> Response:
    return RedirectResponse("/static/favicon.svg", 308)


def _inside(target: str) -> str:
    """A path of our own, whatever was asked for: a link may not send a person who logs in to another site."""
    safe = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if safe and not target.startswith("/login") else "/"
