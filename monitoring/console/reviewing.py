"""Reviewing answers: what people disliked and what the model was least sure of, for a person to judge or to correct.

A correction is feedback like any other, so a retraining learns from it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from starlette.responses import RedirectResponse, Response

from infra.db import transaction
from infra.errors import UsageError
from monitoring import feedback
from monitoring.console.model import look
from monitoring.console.render import RANGES, SQL, Visit, draw
from registry.names import check_model_name
from registry.profile import FEATURES

_MOST, _NEWEST = 10, 2000  # answers on the page, and those among which the least sure are looked for
_COUNTED = 1000  # corrections: of more it does not matter how many
_SURENESS = 1 + [feature.name for feature in FEATURES].index("mean_logprob")  # PostgreSQL counts from 1


def queue(visit: Visit) -> Response:
    """The disliked first, then those that the model was least sure of, none of which anybody has judged."""
    since = visit.since("7d")
    with transaction() as conn:
        if not (model := visit.query("model")):  # the first there is
            model = next((str(row["name"]) for row in conn.execute(SQL["model_names"])), "")
        else:
            check_model_name(model)
        asked = {"model": model, "since": datetime.now(UTC) - RANGES[since], "limit": _MOST}
        rows = conn.execute(SQL["disliked"], asked).fetchall()
        if len(rows) < _MOST:
            unsure = {"place": _SURENESS, "newest": _NEWEST, "limit": _MOST - len(rows)}
            rows += conn.execute(SQL["unsure"], asked | unsure).fetchall()
        usable = feedback.usable_corrections(conn, model, None, most=_COUNTED)
    here = "/review?" + urlencode({"model": model, "since": since})
    return draw(
        visit, "review.html", model=model, since=since, rows=rows, usable=usable, counted=_COUNTED, here=here, look=look
    )


def give(visit: Visit) -> Response:
    """Feedback on one request, by the person of the session."""
    item: dict[str, Any] = {"request_id": visit.path("id")}
    correction, answer = (  # browsers end a form's lines with both
        visit.form.get(name, "").replace("\r\n", "\n").strip() for name in ("correction", "answer")
    )
    verdict = visit.form.get("verdict", "")
    if verdict == "right":
        item |= {"score": 1, "correction": None}  # nor is one wanted that was given before
    elif correction and correction != answer:
        item |= {"score": -1, "correction": correction}
    elif verdict == "wrong":
        item["score"] = -1
    else:
        raise UsageError("Nothing was changed in the answer.", hint="Correct it, or say that it is right, or wrong.")
    with transaction() as conn:
        key = visit.identity.key_id if visit.identity else None
        feedback.record(conn, [feedback.parse(item)], key_id=key, reviewing=True)
    there = visit.form.get("next", "")
    return RedirectResponse(there if there.startswith("/review?") else f"/requests/{visit.path('id')}", 303)
