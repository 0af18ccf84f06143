"""Requests: a list to filter, and one request's whole story."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from starlette.responses import Response

from infra.db import one, transaction
from infra.errors import NotFound
from monitoring import figures
from monitoring.console.model import look
from monitoring.console.render import RANGES, SQL, Visit, draw
from registry.profile import FEATURES, Feature, Profile

PAGE = 50
SLOTS = ("champion", "challenger", "shadow", "pinned", "none")
STATUS = {"ok": "answered", "error": "failed"}
FEEDBACK = {"any": "with feedback", "negative": "negative", "corrected": "corrected"}
_UNUSUAL = 0.01  # a value is unusual when less than this share of the reference lies in its bin or beyond it


def listing(visit: Visit) -> Response:
    """Newest first, fifty a page, by model, version, slot, status, feedback and time."""
    since, before = visit.since(), _cursor(visit.query("before"))
    version = visit.query("version")
    asked: dict[str, Any] = {
        "model": visit.query("model") or None,
        "version": int(version) if version.isascii() and version.isdigit() and len(version) < 10 else None,
        "slot": visit.query("slot") if visit.query("slot") in SLOTS else None,
        "status": visit.query("status") if visit.query("status") in STATUS else None,
        "feedback": visit.query("feedback") if visit.query("feedback") in FEEDBACK else None,
    }
    with transaction() as conn:
        names = [row["name"] for row in conn.execute(SQL["model_names"])]
        until = None
        if asked["model"] and asked["version"]:  # an old one's are not looked for among all that came since
            until = one(conn, SQL["last_of_version"], asked)["until"]
        source, order = ("of_rated", "newest_rated_first") if asked["feedback"] else ("of_all", "newest_first")
        rows = conn.execute(
            "\n".join((SQL["requests"], SQL[source], SQL["asked_for"], SQL[order])),
            {
                **asked,
                "since": datetime.now(UTC) - RANGES[since],
                "until": until,
                "before_at": before[0] if before else None,
                "before_id": before[1] if before else None,
                "limit": PAGE + 1,
            },
        ).fetchall()
    keep = {name: value for name, value in asked.items() if value is not None} | {"since": since}
    older = None
    if len(rows) > PAGE:
        last = rows[PAGE - 1]
        older = "?" + urlencode({**keep, "before": f"{last['at'].isoformat()}/{last['id']}"})
    return draw(
        visit,
        "requests.html",
        rows=rows[:PAGE],
        asked=asked,
        since=since,
        names=names,
        slots=SLOTS,
        statuses=STATUS,
        feedback=FEEDBACK,
        older=older,
        newest="?" + urlencode(keep) if before else None,
        look=look,
    )


def _cursor(text: str) -> tuple[datetime, UUID] | None:
    at, _, key = text.partition("/")
    try:
        when = datetime.fromisoformat(at)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)), UUID(key)
    except ValueError:
        return None


def story(visit: Visit) -> Response:
    """All that is known of one request; its text only where the model keeps text."""
    text = visit.path("id").removeprefix("chatcmpl-").removeprefix("cmpl-")
    try:
        request_id = UUID(text)
    except ValueError as error:
        raise NotFound("That is not a request's id.", hint="It stands in the answer's x-request-id header.") from error
    at = datetime.fromtimestamp((request_id.int >> 80) / 1000, UTC) if request_id.version == 7 else None
    if at is None or at > datetime.now(UTC) + timedelta(days=1):
        raise NotFound(f"There is no request {request_id}.")
    with transaction() as conn:
        row = conn.execute(
            SQL["request"],
            {"id": request_id, "since": at - timedelta(seconds=2), "until": at + timedelta(seconds=2)},
        ).fetchone()
        if row is None:
            raise NotFound(
                f"There is no request {request_id}.",
                hint="A new one shows within seconds; old ones are dropped after the retention time.",
            )
        profile = conn.execute(SQL["profile"], {"model": row["model"], "number": row["version"]}).fetchone()
    reference = Profile.from_json(profile["profile"]) if profile and profile["profile"] else None
    return draw(
        visit,
        "request.html",
        r=row,
        look=look(row["version"]) if row["version"] else "",
        features=[_feature(f, v, reference) for f, v in zip(FEATURES, row["features"], strict=False) if v == v],
        rate=row["completion_tokens"] / (row["latency_ms"] / 1000) if row["latency_ms"] else None,
    )


def _feature(feature: Feature, value: float, reference: Profile | None) -> dict[str, Any]:
    """A feature's value, and whether the version's reference hardly ever had one like it."""
    share = None
    if reference and (counts := reference.histograms.get(feature.name)) and sum(counts):
        index = feature.bin(value)
        inside = (
            counts[index]
            if feature.kind in ("flag", "category")
            else min(sum(counts[: index + 1]), sum(counts[index:]))
        )
        share = inside / sum(counts)
    return {
        "label": feature.label[:1].upper() + feature.label[1:],
        "side": feature.side,
        "value": _write(feature, value, reference),
        "unusual": share is not None and share < _UNUSUAL,
    }


def _write(feature: Feature, value: float, reference: Profile | None) -> str:
    if not math.isfinite(value):
        return figures.DASH
    if feature.kind == "flag":
        return "yes" if value >= 0.5 else "no"
    if feature.kind == "category":
        return (reference or Profile(histograms={})).group(feature, feature.bin(value))
    return figures.percent(value) if feature.kind == "share" else figures.number(value)
