"""What applications and other gateways tell the monitor over HTTP: feedback, and events of their own."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from deploy.auth import Identity, needs, require
from infra.db import transaction
from infra.errors import UsageError
from monitoring import events, feedback, gauges

_REPLICA = uuid.UUID(int=0)  # events of other gateways belong to none of our replicas


def routes() -> list[BaseRoute]:
    """The routes of this package, for ``deploy.gateway.create_app``."""
    return [
        Route("/v1/feedback", post_feedback, methods=["POST"]),
        Route("/v1/events", post_events, methods=["POST"]),
        Route("/metrics/models", model_metrics),
    ]


@needs("service")
async def post_feedback(request: Request) -> Response:
    """One piece of feedback (monitoring.feedback.Item); answers with our id of the request."""
    identity = require(request, "service")
    item = feedback.parse(_json(await request.body()))
    identifier = await asyncio.to_thread(_record, item, identity)
    return Response(orjson.dumps({"request_id": identifier}), media_type="application/json")


def _record(item: feedback.Item, identity: Identity) -> uuid.UUID:
    with transaction() as conn:
        [identifier] = feedback.record(conn, [item], key_id=identity.key_id, own_only=identity.role == "service")
    return identifier


@needs("operator")
async def post_events(request: Request) -> Response:
    """Events of another gateway, one JSON object a line; the same event again changes nothing. All or none of a
    body is taken: 400 names each wrong line."""
    # Megabytes of JSON take a while, and this loop also answers requests
    found = await asyncio.to_thread(events.parse, await request.body())
    new = await asyncio.to_thread(_store, found)
    return Response(orjson.dumps({"events": len(found), "new": new}), media_type="application/json")


def _store(found: list[events.Foreign]) -> int:
    with transaction() as conn:
        return events.store(conn, _REPLICA, found)


@needs("viewer")
async def model_metrics(request: Request) -> Response:
    """Prometheus text: what serves, open alerts, drift, and today's traffic and cost."""
    return Response(await asyncio.to_thread(_gauges), media_type="text/plain; version=0.0.4; charset=utf-8")


def _gauges() -> bytes:
    with transaction() as conn:
        return gauges.text(conn)


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"The body is not JSON: {error.msg}.") from error
