"""The watcher, turn by turn: verdicts, alerts with hysteresis, retrainings under guard, and two watchers."""

from __future__ import annotations

import json
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import traffic
from click.testing import CliRunner
from psycopg.types.json import Jsonb
from version_rows import add_version

from deploy import budgets, recorder
from infra import settings as infra_settings
from infra.db import connect, one, transaction
from infra.settings import Settings
from monitoring import alerts, commands, feedback, story, watch
from monitoring.console import traffic as console_traffic
from monitoring.console.render import RANGES
from registry import aliases, deployments, leases
from registry.profile import Profile

SETTINGS = {
    "monitoring": {"keep_text": True, "min_requests": 100, "window": "24h", "alerts": []},
    "retrain": {"on": "drift", "min_rows": 50, "cooldown": "10m"},
}


class Prefect:
    """A server that speaks the two calls of Prefect's API that the watcher makes, and remembers them."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.deployments = {"m"}
        prefect = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path.rpartition("/")[2] in prefect.deployments
                self._answer(200 if known else 404, {"id": "d1"} if known else {"detail": "not found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                keys = [b["idempotency_key"] for b in prefect.created]
                if body["idempotency_key"] not in keys:
                    prefect.created.append({**body, "path": self.path, "id": str(uuid.uuid4())})
                same = next(b for b in prefect.created if b["idempotency_key"] == body["idempotency_key"])
                self._answer(201, {"id": same["id"]})

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def prefect(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefect]:
    server = Prefect()
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    infra_settings.get_settings.cache_clear()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(scope="module")
def worlds() -> tuple[list[traffic.Pair], list[traffic.Pair]]:
    old, new = traffic.worlds()
    return traffic.shuffled(old, 7), traffic.shuffled(new, 7)


def served(pairs: list[traffic.Pair], version: int, profile: Profile, **changes: Any) -> list[dict[str, Any]]:
    events = [traffic.event("m", version, profile, pair, keep_text=True) | changes for pair in pairs]
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), events)
    return events


def turn(watcher: watch.Watcher) -> None:
    """One turn in which everything is due."""
    for step in watcher._steps:
        step.due = 0.0
    watcher._judged.clear()
    watcher.turn()
    assert not [step.name for step in watcher._steps if step.failures and step.name != "relaying to MLflow"]


def verdict(version: int) -> str | None:
    with transaction() as conn:
        row = conn.execute(
            "select verdict from verdict where version = %s order by at desc limit 1", (version,)
        ).fetchone()
    return row["verdict"] if row else None


def open_alerts() -> list[tuple[int, str]]:
    with transaction() as conn:
        return sorted((a["version"], a["rule"]) for a in alerts.listing(conn))


def requests() -> list[dict[str, Any]]:
    with transaction() as conn:
        return list(conn.execute("select * from retrain_request order by at"))


def drift_json(ref: str, *more: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(commands.drift, [ref, "--json", *more])
    return done.exit_code, json.loads(done.stdout)


def test_from_quiet_traffic_to_a_retrained_version(
    prefect: Prefect, worlds: tuple[list[traffic.Pair], list[traffic.Pair]]
) -> None:
    old, new = worlds
    first = traffic.profile(old[:900], old[900:1060])
    with transaction() as conn:
        traffic.register(conn, "m", 1, first, settings=SETTINGS)
    watcher = watch.Watcher("test")
    turn(watcher)
    assert verdict(1) == "too_few"

    served(old[1060:1260], 1, first)
    turn(watcher)
    assert verdict(1) == "stable"
    assert drift_json("m:1", "--exit-code")[0] == 0
    assert open_alerts() == []

    foreign = served(new[:200], 1, first)
    turn(watcher)
    turn(watcher)
    assert verdict(1) == "drift"
    assert open_alerts() == [(1, "drift")], "once, however often it is seen"
    code, body = drift_json("m", "--exit-code")
    assert code == 3
    assert set(body) == {
        "model", "version", "since", "until", "verdict", "features", "explanation", "attribution", "versions"
    }  # fmt: skip
    assert set(body["features"][0]) == {"name", "side", "statistic", "value", "threshold", "drifted", "usual", "also"}
    assert body["versions"] == [{"version": 1, "slot": "champion", "verdict": "drift"}]
    assert any(word in body["explanation"] for word in ("`axis`", "`dtype`", "`ndarray`", "`numpy`", "`tensor`"))
    assert [r["state"] for r in requests()] == ["refused"]
    assert requests()[0]["reason"].startswith("0 of the 50 corrections")

    items = [{"request_id": e["id"], "score": -1, "correction": "Return it."} for e in foreign[:60]]
    with transaction() as conn:
        feedback.record(conn, [feedback.parse(i) for i in items[:30]], model="m")
    turn(watcher)
    assert requests()[0]["reason"].startswith("30 of the 50 corrections")
    with transaction() as conn:
        feedback.record(conn, [feedback.parse(i) for i in items[30:]], model="m")
        run = leases.acquire(conn, "run:m", "someone", 600)
    turn(watcher)
    assert "is in progress (someone)" in requests()[0]["reason"]
    assert len(requests()) == 1
    with transaction() as conn:
        leases.release(conn, run)
    watcher.judge()
    assert [r["state"] for r in requests()] == ["refused"], "it was looked at just now"
    watcher._judged = {key: at - watch.JUDGE_WAITING for key, at in watcher._judged.items()}
    watcher.judge()
    watcher.start_retrainings()
    asked = requests()[-1]
    assert asked["state"] == "started"
    assert [b["parameters"] for b in prefect.created] == [{"model": "m", "request": str(asked["id"])}]
    assert str(asked["flow_run_id"]) == prefect.created[0]["id"]
    turn(watcher)
    turn(watcher)
    assert len(prefect.created) == 1, "an episode asks once"

    # the second version, from both worlds, sees the same mixture
    second = traffic.profile(new[:200] + old[:200], new[400:460] + old[900:960])
    with transaction() as conn:
        traffic.register(conn, "m", 2, second, settings=SETTINGS)
    turn(watcher)
    assert open_alerts() == [], "an alert of a version that serves no more is over"
    served(old[1300:1400] + new[500:600], 2, second)
    turn(watcher)
    assert verdict(2) == "stable"
    _, body = drift_json("m")
    assert {v["version"]: v["verdict"] for v in body["versions"]} == {1: "drift", 2: "stable"}

    # back to version 1: its alert opens again, but nothing new came since the last retraining
    with transaction() as conn:
        traffic.serve(conn, "m", 1)
    turn(watcher)
    turn(watcher)
    assert open_alerts() == [(1, "drift")]
    assert len(prefect.created) == 1
    assert "less than 10m ago" in requests()[-1]["reason"]
    with transaction() as conn:
        conn.execute("update retrain_request set at = at - interval '1 hour' where state = 'started'")
        conn.execute("update feedback set at = at - interval '1 hour'")
    turn(watcher)
    assert "of the 50 corrections" in requests()[-1]["reason"]
    watcher.release()


def test_a_request_waits_for_its_flow_and_starts_once(prefect: Prefect) -> None:
    from monitoring import retraining

    with transaction() as conn:
        traffic.register(conn, "m", 1, traffic.profile([], []), settings=SETTINGS)
        identifier = uuid.uuid4()
        conn.execute(
            "insert into retrain_request (id, model, state, reason) values (%s, 'm', 'asked', 'Drift.')", (identifier,)
        )
    prefect.deployments.clear()
    assert retraining.start_asked() == 0
    assert retraining.start_asked() == 0
    assert requests()[0]["reason"].count("Waits:") == 1
    prefect.deployments.add("m")
    assert retraining.start_asked() == 1
    assert requests()[0]["reason"] == "Drift."
    # killed between Prefect's answer and our commit: asked again, still one flow run
    with transaction() as conn:
        conn.execute("update retrain_request set state = 'asked', flow_run_id = null")
    assert retraining.start_asked() == 1
    assert len(prefect.created) == 1


def test_limits_open_and_close_with_hysteresis(database: Settings) -> None:
    profile = traffic.profile([], [])
    settings = {
        "monitoring": {"alerts": [{"metric": "p95_latency_ms", "above": 500, "below": None, "severity": "critical"}]}
    }
    pair = ("f(x)", "Return x.")
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings=settings)

    def look(latency: float, status: int = 200) -> list[tuple[int, str]]:
        with transaction() as conn:
            conn.execute("truncate request_event, event_batch, traffic_window")
        served([pair] * 40, 1, profile, latency_ms=latency, status=status)
        turn(watcher)
        return open_alerts()

    watcher = watch.Watcher("test")
    assert look(490) == []
    assert look(900) == [(1, "p95_latency_ms above")]
    assert look(450) == [(1, "p95_latency_ms above")], "under the limit, but not clear of it"
    assert look(300) == []
    assert look(450) == [], "and not opened by what would not have closed it"
    assert look(300, status=500) == [(1, "error_rate above")]
    with transaction() as conn:
        conn.execute("truncate request_event, event_batch, traffic_window")
    turn(watcher)
    assert open_alerts() == [(1, "error_rate above")], "silence is no proof"
    with transaction() as conn:
        conn.execute("update alert set seen_at = now() - interval '2 hours' where closed_at is null")
    turn(watcher)
    assert open_alerts() == []
    with transaction() as conn:
        history = alerts.listing(conn, "m", closed=True)
    assert [a["severity"] for a in history] == ["critical", "critical"]
    said = {alert["rule"]: alert["message"] for alert in history}
    assert re.fullmatch(
        r"m:1: one answer in 20 took 9\d\d ms or longer, above the limit of 500 ms"
        r" \(40 requests of the last 15 minutes\)\.",
        said["p95_latency_ms above"],
    )
    assert said["error_rate above"].startswith("m:1: 100 % of requests failed, above the limit of 5 %")


def test_several_limits_of_a_figure_are_one_alert_that_only_gets_worse(database: Settings) -> None:
    profile = traffic.profile([], [])
    limits = [{"metric": "p95_latency_ms", "above": 500, "severity": "warning"},
              {"metric": "p95_latency_ms", "above": 1000, "severity": "critical"}]  # fmt: skip
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings={"monitoring": {"alerts": limits}})
    watcher = watch.Watcher("test")

    def look(latency: float) -> list[tuple[str, bool]]:
        with transaction() as conn:
            conn.execute("truncate request_event, event_batch, traffic_window")
        served([("f(x)", "Return x.")] * 40, 1, profile, latency_ms=latency)
        turn(watcher)
        turn(watcher)
        with transaction() as conn:
            return [(a["severity"], a["closed_at"] is not None) for a in alerts.listing(conn, "m", closed=True)]

    assert look(700) == [("warning", False)], "over one limit and clear of the other: neither opened and closed"
    assert look(1200) == [("critical", False)]
    assert look(700) == [("critical", False)]
    assert look(450) == [("critical", False)], "between"
    assert look(300) == [("critical", True)]
    with transaction() as conn:
        told = conn.execute("select message from notification where target = 'webhook' order by id").fetchall()
    assert [(t["message"]["type"], t["message"]["data"]["severity"]) for t in told] == [
        ("alert.opened", "warning"), ("alert.opened", "critical"), ("alert.closed", "critical"),
    ]  # fmt: skip


def test_no_retraining_where_only_the_answers_changed(
    prefect: Prefect, worlds: tuple[list[traffic.Pair], list[traffic.Pair]]
) -> None:
    """An engine that answers nothing cannot be mended by training."""
    old, _ = worlds
    profile = traffic.profile(old[:900], old[900:1060])
    settings = SETTINGS | {"retrain": {"on": "drift", "min_rows": 0, "cooldown": "10m"}}
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings=settings)
    served([(asked, "") for asked, _ in old[1060:1260]], 1, profile)
    watcher = watch.Watcher("test")
    turn(watcher)
    assert verdict(1) == "drift"
    assert [(r["state"], r["reason"].split(",")[0]) for r in requests()] == [("refused", "Only the answers changed")]
    assert prefect.created == []
    watcher.release()


def test_scores_are_compared_with_those_given_before(
    database: Settings, worlds: tuple[list[traffic.Pair], list[traffic.Pair]]
) -> None:
    old, _ = worlds
    profile = traffic.profile(old[:900], old[900:1060])
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings=SETTINGS)

    def rated(pairs: list[traffic.Pair], liked: float) -> None:
        events = served(pairs, 1, profile)
        items = [{"request_id": e["id"], "score": 1 if i < liked * 60 else -1} for i, e in enumerate(events[:60])]
        with transaction() as conn:
            feedback.record(conn, [feedback.parse(item) for item in items], model="m")

    watcher = watch.Watcher("test")
    rated(old[1060:1260], 0.9)
    turn(watcher)
    assert verdict(1) == "stable", "nothing was there before"
    with transaction() as conn:
        conn.execute("truncate request_event, event_batch, traffic_window")
        conn.execute(
            "update feedback set at = at - interval '2 days', scored_at = scored_at - interval '2 days',"
            " request_at = request_at - interval '2 days'"
        )
    rated(old[1260:1460], 0.85)
    turn(watcher)
    assert verdict(1) == "stable"
    with transaction() as conn:
        conn.execute("update feedback set score = -1 where at > now() - interval '1 day'")
    turn(watcher)
    assert verdict(1) == "drift"
    _, body = drift_json("m:1")
    assert [f["name"] for f in body["features"] if f["drifted"]] == ["score"]
    assert "people like the answers less than they did" in body["explanation"]
    assert body["attribution"]["cause"] == "judge", "the same version was liked with the same answers"
    assert [r["state"] for r in requests()] == ["refused"]
    assert requests()[0]["reason"].startswith("Only the scores changed")
    watcher.release()


def test_a_budget_that_is_used_up_and_what_is_refused_are_alerts(database: Settings) -> None:
    """Neither is any version's traffic: what is refused stands in no window."""
    profile = traffic.profile([], [])
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings={})
        budgets.limit(conn, "model", "m", {"usd": 10.0}, actor="test")
    watcher = watch.Watcher("test")

    def spend(used: float) -> list[tuple[int, str]]:
        with transaction() as conn:
            conn.execute(
                "insert into spending (scope, name, kind, start, used)"
                " values ('model', 'm', 'usd', date_trunc('day', now(), 'UTC'), %(used)s)"
                " on conflict (scope, name, kind, start) do update set used = excluded.used",
                {"used": used},
            )
        turn(watcher)
        return open_alerts()

    assert spend(7.9) == []
    assert spend(8.5) == [(1, "budget")]
    served([("f(x)", "Return x.")] * 60, 1, profile)

    def refuse(count: int) -> None:
        said = {"version": None, "status": 429, "error": "rate_limit_exceeded: The model m has used its limit"}
        with transaction() as conn:
            events = [traffic.event("m", 1, profile, ("f(x)", "")) | said for _ in range(count)]
            recorder.store(conn, uuid.uuid4(), events)

    refuse(3)
    assert spend(10.0) == [(1, "budget")], "a few refusals among many answers are none to wake anybody for"
    refuse(30)
    assert spend(10.0) == [(1, "budget"), (1, "refused")]
    with transaction() as conn:
        found = {alert["rule"]: alert for alert in alerts.listing(conn)}
        told = story.of(conn, found["refused"], datetime.now(UTC))
    assert (found["budget"]["severity"], found["budget"]["cause"]) == ("critical", None)
    assert re.match(r"m:1: \$10\S* of \$10\S* a day are used up: clients are", found["budget"]["message"])
    assert "33 of 93 requests" in found["refused"]["message"]
    assert "The model m has used its limit" in found["refused"]["message"]
    assert any("--usd-per-day" in advice for advice in told.advice)
    with transaction() as conn:
        budgets.limit(conn, "model", "m", {"usd": 100.0}, actor="test")
        conn.execute("delete from request_event where status = 429")
    assert spend(10.0) == []


def test_a_copy_that_fails_wakes_nobody_and_is_nobodys_request(database: Settings) -> None:
    profile = traffic.profile([], [])
    with transaction() as conn:
        for number in (2, 1):
            traffic.register(conn, "m", number, profile, settings={})
        conn.execute("update deployment set shadow = 2")
    pair = ("f(x)", "Return x.")
    served([pair] * 30, 1, profile)
    served([pair] * 30, 2, profile, slot="shadow", status=503)
    watcher = watch.Watcher("test")
    turn(watcher)
    with transaction() as conn:
        assert [(a["version"], a["rule"], a["severity"]) for a in alerts.listing(conn)] == [
            (2, "error_rate above", "info")
        ]
        flow = console_traffic.read(conn, "m", RANGES["1h"])
        usage = conn.execute("select sum(requests) as n from key_usage").fetchone()
    assert (flow.total.requests, flow.total.errors, flow.by_version[2].requests) == (30, 0, 30)
    assert usage is not None
    assert usage["n"] == 30


def test_one_slow_answer_among_failures_is_no_percentile(database: Settings) -> None:
    profile = traffic.profile([], [])
    with transaction() as conn:
        traffic.register(conn, "m", 1, profile, settings={})
    served([("f(x)", "Return x.")] * 3, 1, profile, latency_ms=90_000.0)
    served([("f(x)", "Return x.")] * 60, 1, profile, status=429)
    watcher = watch.Watcher("test")
    turn(watcher)
    assert open_alerts() == []


def test_a_gateway_that_cannot_follow_is_an_alert(database: Settings) -> None:
    for number in (1, 2):
        with transaction() as conn:
            add_version(conn, "m", number)
            deployments.promote(conn, "m", number, actor="t", reason="t", force=True)
    one, other = uuid.uuid4(), uuid.uuid4()
    since: dict[str, tuple[int, datetime]] = {}
    start = datetime.now(UTC)

    def report(gateway: uuid.UUID, at: int, *, ready: bool, age: int = 0) -> list[tuple[str, int, str]]:
        with transaction() as conn:
            conn.execute(
                "insert into replica (id, model, generation, ready, message, seen_at)"
                " values (%s, 'm', 2, %s, %s, now() - make_interval(secs => %s)) on conflict (id, model) do update"
                " set ready = excluded.ready, message = excluded.message, seen_at = excluded.seen_at",
                (gateway, ready, "" if ready else "m:2 is not ready: its bundle is damaged", age),
            )
            alerts.look_at_gateways(conn, since, start + timedelta(seconds=at))
            return [(a["rule"], a["version"], a["message"]) for a in alerts.listing(conn)]

    assert report(one, 0, ready=True) == []
    assert report(other, 1, ready=False) == []  # however old the deployment is, it may take a moment
    assert report(other, 20, ready=False) == []
    said = (
        "1 of 2 gateways could not follow the last change of m (generation 2) for 30 s, and serve what they have: "
        "m:2 is not ready: its bundle is damaged."
    )
    assert report(other, 31, ready=False) == [("not serving", 2, said)]
    with transaction() as conn:
        alerts.close_retired(conn, "m", [2], {})
        assert len(alerts.listing(conn)) == 1
    assert len(report(one, 32, ready=True)) == 1  # the other is still behind
    assert report(other, 33, ready=True) == []
    assert report(other, 34, ready=False) == []  # the time counts anew
    assert report(other, 70, ready=False) != []
    assert report(other, 71, ready=False, age=60) == []  # it is gone, or cut off; it follows what there is
    with transaction() as conn:
        conn.execute("update deployment set generation = 3 where model = 'm'")
        conn.execute("update replica set generation = 3 where id = %s", (one,))
        for at, told in ((80, 0), (111, 1)):  # since then there was a change, which it has not heard of
            alerts.look_at_gateways(conn, since, start + timedelta(seconds=at))
            assert len(found := alerts.listing(conn)) == told
        assert "1 of 2 gateways" in found[0]["message"]
        assert "nothing is heard of it" in found[0]["message"]


def test_an_alert_between_its_limits_outlives_a_lull(database: Settings) -> None:
    with transaction() as conn:
        traffic.register(conn, "m", 1, traffic.profile([], []), settings=SETTINGS)

        def told(state: alerts.State) -> int:
            alerts.apply(conn, "m", 1, [alerts.Finding(rule="error_rate above", state=state, message="Too many.")])
            return len(alerts.listing(conn))

        assert told("over") == 1
        conn.execute("update alert set seen_at = now() - interval '2 hours'")
        assert told("between") == told("unknown") == 1
        conn.execute("update alert set seen_at = now() - interval '2 hours'")
        assert told("unknown") == 0, "neither confirmed nor over, for long"


def test_housekeeping_gives_way_to_a_long_reader(database: Settings) -> None:
    watcher = watch.Watcher("test")
    turn(watcher)  # it keeps house once, at its beginning
    with transaction() as conn:
        conn.execute(
            "create table request_event_20200101 partition of request_event"
            " for values from ('2020-01-01 00:00:00+00') to ('2020-01-02 00:00:00+00')"
        )

    def there() -> bool:
        with transaction() as conn:
            return bool(one(conn, "select to_regclass('request_event_20200101') is not null as yes")["yes"])

    with connect() as reader:
        reader.execute("select count(*) from request_event")  # and does not end its transaction
        watcher._partitions(30)
        assert there()
    watcher._partitions(30)
    assert not there()


@pytest.mark.parametrize("profile", [{"format": 99}, {"format": 1}, {"format": 1, "histograms": 3, "vocabulary": {}}])
def test_a_version_that_cannot_be_judged_holds_up_no_other(
    database: Settings, caplog: pytest.LogCaptureFixture, profile: dict[str, Any]
) -> None:
    pair, good = ("f(x)", "Return x."), traffic.profile([], [])
    with transaction() as conn:
        for model in ("a-bad", "m"):
            traffic.register(conn, model, 1, good, settings=SETTINGS)
        conn.execute("alter table version disable trigger user")  # as an older release may have written it
        conn.execute("update version set profile = %s where model = 'a-bad'", (Jsonb(profile),))
        foreign = [traffic.event("a-bad", 1, good, pair, keep_text=True) for _ in range(3)]
        recorder.store(conn, uuid.uuid4(), foreign)
    served([pair] * 120, 1, good)
    watcher = watch.Watcher("test")
    turn(watcher)
    turn(watcher)
    with transaction() as conn:
        assert {row["model"] for row in conn.execute("select model from verdict")} == {"m"}
        assert one(conn, "select sum(requests) as n from traffic_window where grain = 'minute'")["n"] == 123
    told = [record.message for record in caplog.records if "cannot be judged" in record.message]
    assert len(told) == 1, "once, not at every turn"
    assert told[0].startswith("a-bad:1 cannot be judged: ")
    with transaction() as conn:
        conn.execute("update version set profile = '{}' where model = 'a-bad'")
    turn(watcher)
    with transaction() as conn:
        assert {row["model"] for row in conn.execute("select model from verdict")} == {"a-bad", "m"}


def test_an_mlflow_that_hangs_is_asked_for_one_model_a_turn(
    database: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    calls.append(silent.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(aliases, "_SECONDS", 0.2)
        infra_settings.get_settings.cache_clear()
        with transaction() as conn:
            for model in ("a", "b", "c"):
                add_version(conn, model, 1)
                deployments.promote(conn, model, 1, actor="test", reason="test")
        watcher = watch.Watcher("test")
        watcher.turn()
        silent.shutdown(socket.SHUT_RDWR)
    for call in calls:
        call.close()
    assert len(calls) == 3, "one model's three tries"
    with transaction() as conn:
        rows = conn.execute("select attempts, error from outbox").fetchall()
    assert [row["attempts"] for row in rows] == [1, 1, 1]
    assert all("MLflow does not answer" in row["error"] for row in rows)


def test_one_of_two_watchers_works(database: Settings) -> None:
    first, second = watch.Watcher("first"), watch.Watcher("second")
    first.turn()
    second.turn()
    assert first.lease is not None
    assert second.lease is None
    with transaction() as conn:  # the first is stopped for longer than its lease
        conn.execute("update lease set expires_at = now() - interval '1 second' where name = 'watch'")
    second.turn()
    assert second.lease is not None
    first.turn()
    assert first.lease is None, "an old token writes nothing"
    second.release()
    first.turn()
    assert first.lease is not None


def test_partitions_come_and_go(database: Settings) -> None:
    watcher = watch.Watcher("test")
    day = datetime.now(UTC).date() - timedelta(days=40)
    with transaction() as conn:
        conn.execute(
            f"create table request_event_{day:%Y%m%d} partition of request_event"
            f" for values from ('{day} 00:00+00') to ('{day + timedelta(days=1)} 00:00+00')"
        )
        conn.execute(
            "insert into outbox (kind, model, done_at) values"
            " ('mlflow_aliases', 'old', now() - interval '40 days'), ('mlflow_aliases', 'new', now())"
        )
    turn(watcher)
    with transaction() as conn:
        assert {row["model"] for row in conn.execute("select model from outbox")} == {"new"}
        rows = conn.execute("select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid"
                            " where i.inhparent = 'request_event'::regclass")  # fmt: skip
        names = {row["relname"] for row in rows}
        today = one(conn, "select to_char(now() at time zone 'utc', 'YYYYMMDD') as day")["day"]
    assert f"request_event_{day:%Y%m%d}" not in names
    assert f"request_event_{today}" in names
    assert "request_event_default" in names
    watcher.release()
