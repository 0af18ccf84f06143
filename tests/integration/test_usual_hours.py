"""The rhythm of the day through the database: nights are told until they are known, and what comes on top is found."""

from __future__ import annotations

import json
import random
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import traffic
from click.testing import CliRunner

from deploy import recorder
from infra.db import transaction
from infra.settings import Settings
from monitoring import commands, drift, windows

PER_HOUR, NIGHT = 24, 4  # requests, and the last hours of each day, in which people ask for other things
DAYS, SHIFTED = 9, 7  # from the eighth day on the nights bring something new
SETTINGS: dict[str, Any] = {"monitoring": {"min_requests": 30, "window": f"{NIGHT}h"}}


def test_nights_are_usual_once_they_are_known_and_what_is_new_in_them_is_drift(database: Settings) -> None:
    """In drift.judge as the watcher calls it, with real text, windows, and a version that serves for nine days."""
    draw = random.Random(3)
    days, nights = (traffic.shuffled(world, 7) for world in traffic.worlds())
    new = [(question.upper() + " " + "0123456789 " * 6, answer) for question, answer in days[500:700]]
    known = [*days[:500], *nights[:100]]  # of all hours, as they are in a day
    profile = traffic.profile(known, known)
    # Of each kind so many that few come twice: of the same few questions whole days differ from what was trained on
    kinds = {
        name: [traffic.event("m", 1, profile, pair) for pair in pairs]
        for name, pairs in (("day", days[700:3000]), ("night", nights[100:]), ("new", new))
    }
    end = windows.floor(datetime.now(UTC), "hour")

    def kind(day: int, hour: int) -> str:
        if hour < 24 - NIGHT:
            return "day"
        return "new" if day >= SHIFTED and draw.random() < 0.5 else "night"

    events = []
    for day in range(DAYS):
        for hour in range(24):
            start = end - timedelta(days=DAYS - day) + timedelta(hours=hour)
            for n in range(PER_HOUR):
                at = start + n * timedelta(hours=1) / PER_HOUR
                events.append(draw.choice(kinds[kind(day, hour)]) | {"id": str(traffic.uuid7(at))})
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings=SETTINGS)
        recorder.store(conn, uuid.uuid4(), events)
    while True:
        with transaction() as conn:
            if not windows.close(conn).events:
                break

    found = []
    with transaction() as conn:
        for day in range(DAYS):
            until = end - timedelta(days=DAYS - 1 - day)
            found.append(drift.judge(conn, "m", 1, until - timedelta(hours=NIGHT), until))
    assert [body["verdict"] for body in found] == ["drift"] * 2 + ["stable"] * 5 + ["drift"] * 2
    assert "are as usual at these hours" in found[6]["explanation"]
    usual = [f["usual"] for f in found[6]["features"] if f["usual"]]
    assert usual
    assert all(u["days"] == 6 for u in usual), "those that were over"
    assert "Compared with the same hours of its first days" in found[7]["explanation"]

    until = end - timedelta(days=DAYS - 1 - 6)
    asked = ["m", "--since", (until - timedelta(hours=NIGHT)).isoformat(), "--until", until.isoformat()]
    told = CliRunner().invoke(commands.drift, asked)
    assert "usual at these hours" in told.output
    assert json.loads(CliRunner().invoke(commands.drift, [*asked, "--json"]).stdout)["verdict"] == "stable"
