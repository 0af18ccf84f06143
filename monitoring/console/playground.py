"""Two versions side by side: the page. The questions go from the browser to the gateway's own API."""

from __future__ import annotations

from starlette.responses import Response

from infra.db import transaction
from monitoring.console.render import SQL, Visit, draw


def show(visit: Visit) -> Response:
    """Every version of every model may be asked; champion and its predecessor are chosen to begin with."""
    with transaction() as conn:
        models = conn.execute(SQL["models"], {"model": None}).fetchall()
        choices = {m["name"]: [v["number"] for v in conn.execute(SQL["numbers"], {"model": m["name"]})] for m in models}
    serving = [m for m in models if choices[m["name"]]]
    first = next((m for m in serving if m["name"] == visit.query("model")), serving[0] if serving else None)
    left = right = ""
    if first:
        name, numbers = first["name"], choices[first["name"]]
        left = visit.query("left") or (f"{name}@champion" if first["champion"] else f"{name}:{numbers[0]}")
        other = next((n for n in numbers if n != (first["champion"] or numbers[0])), None)
        right = visit.query("right") or (f"{name}:{other}" if other else "")
    return draw(visit, "playground.html", models=serving, choices=choices, left=left, right=right)
