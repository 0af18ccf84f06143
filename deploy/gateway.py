"""The gateway: OpenAI's API over whatever serves, the control API, and the pages given to it, at one address.

The path of a request: the guard (key) -> checks -> routing -> engine -> answer in the version's name -> event.
Every inference request by a known key is recorded, refused ones too (version null); requests without a valid key
are only counted, so that a flood of them cannot fill a disk. One process, one event loop, no heavy imports.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.api import control_api
from deploy.auth import Auth, Guard, identify, needs
from deploy.bounds import Bounds
from deploy.budgets import Budgets
from deploy.errors import crashed, explain, json_response
from deploy.follower import STALE_SECONDS, Follower
from deploy.inference import Inference, Limits
from deploy.metrics import Metrics
from deploy.recorder import Recorder
from deploy.upstream import Upstream
from infra.errors import NoModel, TunesmithError
from infra.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings, *, routes: Sequence[BaseRoute] = (), limits: Limits | None = None) -> Starlette:
    """The ASGI application. `routes` are further pages and APIs behind the same guard; they find `auth`,
    `follower`, `recorder` and `metrics` in ``request.app.state``."""
    replica = uuid.uuid4()
    auth = Auth()
    metrics = Metrics()
    recorder = Recorder(settings.home / "spool", replica)
    upstream = Upstream(settings.engine_secret.get_secret_value() if settings.engine_secret else None)
    follower = Follower(settings, upstream, replica)
    budgets = Budgets()
    inference = Inference(follower, upstream, recorder, metrics, budgets, limits or Limits())
    chat, completion = inference.endpoint("chat"), inference.endpoint("completion")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        recorder.start()
        await upstream.open()
        tasks = [asyncio.create_task(part.run()) for part in (auth, follower, budgets)]
        try:
            yield
        finally:
            await inference.finish()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await budgets.close()
            await upstream.close()
            await asyncio.to_thread(recorder.close)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{model}", one_model),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
            *routes,
            control_api(),
        ],
        middleware=[
            Middleware(Guard, auth=auth, on_refused=metrics.unauthenticated.inc),
            Middleware(Straight, endpoints={"/v1/chat/completions": chat, "/v1/completions": completion}),
            Middleware(Bounds),
        ],
        exception_handlers={TunesmithError: explain, HTTPException: explain, Exception: crashed},
        lifespan=lifespan,
    )
    app.state.auth = auth
    app.state.follower = follower
    app.state.recorder = recorder
    app.state.metrics = metrics
    app.state.upstream = upstream
    return app


class Straight:
    """ASGI middleware behind the guard: inference requests go past the rest of the application, which would add a
    tenth of a millisecond; their endpoints look after bounds and errors themselves."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, ASGIApp]) -> None:
        self.app, self.endpoints = app, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        straight = scope["type"] == "http" and scope["method"] == "POST"
        app = self.endpoints.get(scope["path"], self.app) if straight else self.app
        await app(scope, receive, send)


def serve(app: Starlette, settings: Settings) -> None:
    """Run the application on the settings' host and port until SIGTERM or SIGINT. Blocks."""
    import uvicorn

    from deploy.clients import Impatient

    gc.collect()
    gc.freeze()  # what was imported is not looked through by each full collection, 17 ms of silence
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Impatient,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )


# ---------------------------------------------------------------- small endpoints


@needs("any")
async def list_models(request: Request) -> Response:
    """OpenAI's list: each model that serves, then each version that is loaded and may be pinned."""
    return json_response({"object": "list", "data": _models(request)})


@needs("any")
async def one_model(request: Request) -> Response:
    wanted = request.path_params["model"]
    for model in _models(request):
        if model["id"] == wanted:
            return json_response(model)
    raise NoModel("There is no such model, or it does not serve.", hint="See GET /v1/models.")


def _models(request: Request) -> list[dict[str, object]]:
    table = request.app.state.follower.table
    names = {route.model: route.champion.created for route in table.routes.values() if route.champion}
    names |= {served.name: served.created for served in table.resident.values()}
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "tunesmith"}
        for name, created in sorted(names.items())
    ]


async def healthz(request: Request) -> Response:
    """The process lives."""
    return json_response({"status": "ok"})


async def readyz(request: Request) -> Response:
    """503 until the deployments were read and each model has a version that answers, or one that is broken. Later it is
    503 only when no model answers: one that does not is no reason to take the others away. It is stale where a change
    is not followed, or could not be read. Whoever has a key also sees which generation of each model is applied, and
    why a newer one is not."""
    follower: Follower = request.app.state.follower
    routes = follower.table.routes.values()
    empty = [route.model for route in routes if route.champion is None and route.message]
    serving = any(route.champion is not None for route in routes)
    ready = follower.synced and (not empty or (serving and (follower.begun or not follower.waiting)))
    follower.begun = follower.begun or ready
    unread = time.monotonic() - follower.read_at
    lost = follower.synced and unread > STALE_SECONDS
    stale = lost or any(not done for _, done, _ in follower.applied.values())
    body: dict[str, object] = {"status": "starting" if not ready else "stale" if stale else "ready"}
    if identify(request):
        body["replica"] = str(follower.replica)
        if lost:
            body["message"] = (
                f"The deployments could not be read for {unread:.0f} s: a change since then is not followed."
            )
        body["models"] = {
            model: {"generation": generation, "ready": done, "message": message}
            for model, (generation, done, message) in sorted(follower.applied.items())
        }
    return json_response(body, 200 if ready else 503)


@needs("any")
async def show_metrics(request: Request) -> Response:
    """Prometheus text."""
    state = request.app.state
    recorder: Recorder = state.recorder
    metrics: Metrics = state.metrics
    for name in ("taken", "arrived", "pending", "dropped", "rejected"):
        metrics.events.labels(name).set(getattr(recorder, name))
    metrics.retries.set(state.upstream.retries)
    metrics.open.clear()
    engines = {url for urls in state.follower.table.engines.values() for url in urls}
    for name, breaker in state.upstream.breakers.items():
        if name.startswith("http") and name not in engines:  # it went
            continue
        metrics.open.labels(name).set({"closed": 0.0, "half-open": 0.5, "open": 1.0}[breaker.state])
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
