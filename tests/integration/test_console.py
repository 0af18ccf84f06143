"""The console as a browser has it: the gateway's real application, a real database, believable rows."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from click.testing import CliRunner
from console_seed import HOSTILE, MODEL, seed
from starlette.testclient import TestClient

from deploy.auth import create_key
from deploy.gateway import create_app
from deploy.rollout import Stream, decide
from infra.db import transaction
from infra.settings import Settings
from monitoring import alerts, drift
from monitoring.console import overview
from monitoring.console.app import console_routes
from pipelines import commands
from registry import deployments, rollouts, studies

SITE = "http://testserver"
BROWSER = {"accept": "text/html", "origin": SITE}


class Page(HTMLParser):
    """What a strict content security policy would forbid, and the ids and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.titles = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "style" in given or tag == "style":
            self.forbidden.append(f"style on {tag}")
        if tag == "script" and not (given.get("src") or "").startswith("/static/"):
            self.forbidden.append("inline script")
        self.forbidden += [f"{name} on {tag}" for name in given if name.startswith("on")]
        if identifier := given.get("id"):
            self.ids.append(identifier)
        if tag == "a" and (href := given.get("href")):
            self.links.add(href)
        self.titles += tag == "title"


@pytest.fixture
def app(database: Settings) -> Iterator[TestClient]:
    with TestClient(
        create_app(database, routes=console_routes()), base_url=SITE, follow_redirects=False, headers=BROWSER
    ) as client:
        yield client


def log_in(client: TestClient, role: str) -> None:
    with transaction() as conn:
        key = create_key(conn, name=f"a {role}", role=role).key
    answer = client.post("/login", data={"key": key, "next": "/alerts"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/alerts")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie


def fill() -> None:
    with transaction() as conn:
        seed(conn, requests=160)


def check(client: TestClient, path: str) -> tuple[str, Page]:
    answer = client.get(path)
    assert answer.status_code == 200, (path, answer.text[:2000])
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe-inline" not in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert page.forbidden == [], path
    assert len(page.ids) == len(set(page.ids)), path
    assert page.titles >= 1
    return answer.text, page


def test_every_page_of_an_empty_database_says_what_to_do(app: TestClient) -> None:
    log_in(app, "viewer")
    for path, words in {
        "/": "tunesmith demo",
        "/alerts": "Nothing is wrong",
        "/requests": "No request matches",
        "/playground": "Nothing to ask",
        "/runs": "tunesmith run",
        "/studies": "No search yet",
        "/data": "No data set yet",
        "/settings": "Nothing is limited",
    }.items():
        assert words in check(app, path)[0]
    for path in (
        "/models/none",
        "/models/none/drift",
        "/models/none/versions/1",
        "/requests/x",
        "/alerts/x",
        f"/alerts/{uuid.uuid4()}",
        "/runs/x",
        "/studies/x",
    ):
        assert app.get(path).status_code == 404, path
    assert app.get("/models/%2e%2e%00").status_code == 400


def test_every_page_and_every_link_renders_with_hostile_text_harmless(app: TestClient) -> None:
    fill()
    log_in(app, "admin")
    seen: set[str] = set()
    todo = ["/"]
    while todo:
        path = todo.pop()
        text, page = check(app, path)
        assert "<script>alert" not in text, path
        # No more than a few requests and example pages: they are all alike.
        for link in sorted(page.links):
            target = link if link.startswith("/") else path.partition("?")[0] + link if link.startswith("?") else ""
            kind = re.sub(r"[0-9a-f-]{36}|before=[^&]+|(feature|since|version)=[^&]+", "*", target)
            if target and kind not in seen and not target.startswith(("/static", "/links")):
                seen.add(kind)
                todo.append(target)
    wanted = {f"/models/{MODEL}{page}" for page in ("", "/drift", "/cost", "/versions/2")} | {"/requests/*", "/runs/*"}
    assert "/alerts/*" in seen
    assert wanted | {"/studies", f"/studies/{MODEL}-s1", f"/studies/{MODEL}-s3"} <= seen
    assert app.get(f"/studies/{MODEL}-s1").text.count("&lt;script&gt;alert") > 5  # errors, parameters, importances
    assert "&lt;script&gt;alert" in app.get("/requests?feedback=").text
    assert "&lt;script&gt;alert" in app.get(f"/models/{MODEL}/versions/1").text
    assert "&lt;script&gt;alert" in app.get("/alerts").text


def test_pages_say_what_happened(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    model, _ = check(app, f"/models/{MODEL}?since=1h")
    assert "v2</strong> promoted over v1" in model
    assert "Rolled back to <strong>v1" in model
    assert model.count("data-tip") > 30  # charts with figures
    tile = model.partition("<dt>Serves</dt>")[2].partition("</dd>")[0]
    assert re.search(r">v2<.*since <time.*9 min ago</time>, promoted by .*>Ada<", tile, re.DOTALL)
    moved, _ = check(app, f"/models/{MODEL}/drift?version=1&since=1h")
    assert "Share of words the training data never had" in moved
    assert '<span class="tag bad light">drift</span>' in moved
    assert "distribution-title" in moved
    for feature in ("similarity", "topic", "refusal", "mean_logprob"):
        assert "distribution-title" in check(app, f"/models/{MODEL}/drift?version=1&since=1h&feature={feature}")[0]
    golden = moved.partition('id="golden"')[2]
    assert golden.index('<span class="tag bad light">worse</span>') < golden.index("as before</span>"), "newest first"
    assert "0.220 [0.190, 0.250]" in golden
    assert "-0.190 [-0.230, -0.150]" in golden
    assert "40 worse, 0 better" in golden
    assert "&lt;script&gt;alert" not in golden, "rows are no viewer's"
    log_in(app, "operator")
    rows = check(app, f"/models/{MODEL}/drift?version=1&since=1h")[0].partition('id="golden"')[2]
    assert "&lt;script&gt;alert" in rows
    log_in(app, "viewer")
    nobody, _ = check(app, f"/models/{MODEL}/drift?version=2&since=1h")
    assert f"tunesmith rescore {MODEL}" in nobody
    version, _ = check(app, f"/models/{MODEL}/versions/2")
    assert "Corrections that people sent" in version
    assert '<span class="tag ">unclear</span>' in version
    assert "Against the hosted model" in version
    assert "<li>Judged good is unavailable: no judge is named.</li>" in version
    assert "<li>The hosted model is big-2026 at https://api.example.org/v1.</li>" in version
    live = app.get(f"/models/{MODEL}", headers={"x-live": "1"})
    assert live.status_code == 200
    assert "<html" not in live.text
    assert "Requests, by version" in live.text


def test_each_model_has_one_worst_state_in_words(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")

    def states() -> dict[str, tuple[str, str]]:
        page, _ = check(app, "/")
        cards = re.findall(
            r'<h2><a[^>]*>([^<]+)</a>.*?worst"[^>]*>([^<]+)<.*?reason"><a[^>]*>([^<]+)<', page, re.DOTALL
        )
        found = {name: (word, why) for name, word, why in cards}
        assert f">{found[MODEL][0]}</a> <strong>{found[MODEL][1]}</strong>" in check(app, f"/models/{MODEL}")[0]
        return found

    assert states() == {
        MODEL: ("Look", "Some answers are slow, and 1 more"),
        "support-intents": ("Idle", "Nothing serves"),
        "empty-model": ("Idle", "Nothing serves"),
    }
    with transaction() as conn:
        for rule in ("not serving", "error_rate above"):
            conn.execute("update alert set closed_at = now() where closed_at is null")
            severity = "warning" if rule == "not serving" else "critical"
            alerts.apply(conn, MODEL, 2, [alerts.Finding(rule=rule, state="over", severity=severity, message="m")])  # type: ignore[arg-type]
    assert states()[MODEL] == ("Act", "Too many requests fail")


def test_a_state_is_the_worst_of_all() -> None:
    fine = {
        "name": "m",
        "champion": 1,
        "alerts": 0,
        "urgent": None,
        "worst": None,
        "behind": False,
        "verdict": "stable",
    }

    def told(**changes: Any) -> tuple[str, str]:
        found = overview.state(fine | changes)
        return found.word, found.why

    worst = {"id": "a", "rule": "drift", "cause": "input"}
    assert told() == ("OK", "No warning, no drift")
    assert told(verdict=None) == ("OK", "No warning, drift not judged yet")
    assert told(alerts=1, urgent=2, worst=worst)[0] == "OK", "mere information is no reason to look"
    assert told(verdict="drift") == ("Look", "Requests or answers have changed")
    assert told(behind=True)[0] == "Look"
    assert told(alerts=3, urgent=1, worst=worst) == (
        "Look",
        "People ask for other things than it was trained on, and 2 more",
    )
    assert told(alerts=1, urgent=0, worst=worst, behind=True)[0] == "Act"
    assert told(champion=None) == ("Idle", "Nothing serves")


def test_a_gateway_that_cannot_serve_says_why_in_short(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    digest = "sha256:" + "2e" * 32
    why = f"{MODEL}:2 is not ready: The bundle {digest} is not in the artifact store."
    with transaction() as conn:
        conn.execute("delete from replica")  # the application's own gateway
        conn.execute(
            "insert into replica (id, model, generation, ready, message) values (%s, %s, 3, false, %s)",
            [uuid.uuid4(), MODEL, why],
        )
        since: dict[str, tuple[int, datetime]] = {}
        now = datetime.now(UTC)
        for at in (now, now + timedelta(minutes=1)):
            alerts.look_at_gateways(conn, since, at)
        alert = conn.execute("select * from alert where rule = 'not serving'").fetchone()
    assert alert is not None
    assert (digest in alert["message"], "2e2e2e2e2e2e " in alert["message"]) == (False, True), "webhooks, and the shell"
    for path in (f"/models/{MODEL}", f"/alerts/{alert['id']}"):
        page, _ = check(app, path)
        assert page.replace(f'title="{digest}"', "").count(digest) == (path != f"/models/{MODEL}"), path


def test_an_alert_says_in_plain_words_what_moved(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    listed, _ = check(app, "/alerts")
    assert "<strong>Some answers are slow</strong>" in listed
    assert "p95_latency_ms" not in listed
    with transaction() as conn:
        now = datetime.now(UTC)
        finding = alerts.of_verdict(drift.judge(conn, MODEL, 1, now - timedelta(hours=1), now))
        alerts.apply(conn, MODEL, 1, [finding])
        alert = conn.execute("select id from alert where rule = 'drift' and closed_at is null").fetchone()
    assert alert is not None
    assert "things measured have changed: " in finding.message
    assert not re.search(r"\b(ks|js|psi|features?|log-probability|mix of)\b", finding.message, re.IGNORECASE)
    said, _, details = check(app, f"/alerts/{alert['id']}")[0].partition('id="details"')
    assert f"<h1>{alerts.title('drift', finding.cause)} " in said
    why, _, todo = said.partition("What to do</h2>")
    assert ("retrain" in why, "retrain" in todo) == (False, True), "once, where it is looked for"
    assert re.search(
        r"<dt>Similarity of answers to corrections</dt><dd>0\.\d+ \(difference\), threshold 0\.\d+", details
    )


def test_verdicts_of_earlier_releases_are_drawn_as_those_of_today(app: TestClient) -> None:
    """Which keep how far each feature was beyond its threshold beside their bodies, that those need not be read."""
    fill()
    log_in(app, "viewer")
    path = f"/models/{MODEL}/drift?version=1&since=24h"

    def heat() -> list[str]:
        return re.findall(r"judged [^\"]* × the threshold", check(app, path)[0])

    with transaction() as conn:
        now = datetime.now(UTC)
        drift.keep(conn, drift.judge(conn, MODEL, 1, now - timedelta(hours=24), now))
    today = heat()
    assert len(today) > 5
    with transaction() as conn:
        conn.execute("update verdict set ratios = null")
    assert heat() == today


def test_who_looks_at_an_alert_sees_that_nobody_is_told_of_it(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    with transaction() as conn:
        [one, *_] = alerts.listing(conn, MODEL)
        alerts.silence(conn, MODEL, one["rule"], timedelta(hours=2), actor="os:ann@here", reason="we know <b>")
    listed, _ = check(app, "/alerts")
    assert f"Nobody is told of <code>{one['rule']}</code>" in listed
    assert "we know &lt;b&gt; (os:ann@here)" in listed
    page, _ = check(app, f"/alerts/{one['id']}")
    assert "Nobody is told of this until" in page


def test_what_has_no_figure_says_why(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    page, _ = check(app, f"/models/{MODEL}/cost")
    assert page.count("not known: add <code>cost</code> to its evaluation&#39;s suites") == 2
    with transaction() as conn:
        conn.execute(
            'update model set settings = settings || \'{"monitoring": {"price": {"per_machine_hour_usd": 0}}}\''
            " where name = %s",
            [MODEL],
        )
    assert check(app, f"/models/{MODEL}/cost")[0].count("the machine has no price") == 2


def test_keys_are_made_and_revoked_by_admins(app: TestClient) -> None:
    fill()
    log_in(app, "operator")
    page, _ = check(app, "/settings")
    assert "Make a key" not in page
    assert app.post("/settings/keys", data={"name": "x", "role": "admin"}).status_code == 403
    log_in(app, "admin")
    made = app.post("/settings/keys", data={"name": HOSTILE[:45], "role": "service"})
    assert made.status_code == 200
    assert "<script>alert" not in made.text
    key = re.search(r"<pre>(ts_(\w+)_\w+)</pre>", made.text)
    assert key is not None
    assert key[1] not in check(app, "/settings")[0], "its secret is shown once"
    revoked = app.post(f"/settings/keys/{key[2]}/revoke")
    assert (revoked.status_code, revoked.headers["location"]) == (303, "/settings")
    with transaction() as conn:
        row = conn.execute("select revoked_at from api_key where id = %s", [key[2]]).fetchone()
    assert row is not None
    assert row["revoked_at"] is not None
    assert app.post("/settings/keys", data={"name": "", "role": "service"}).status_code == 400
    assert app.post("/settings/keys/none/revoke").status_code == 404


def test_answers_are_reviewed_and_corrected(app: TestClient) -> None:
    fill()
    log_in(app, "operator")

    def waiting() -> list[str]:
        page, _ = check(app, f"/review?model={MODEL}&since=24h")
        return re.findall(r'action="/requests/([0-9a-f-]{36})/feedback"', page)

    def given(identifier: str) -> dict[str, Any] | None:
        with transaction() as conn:
            return conn.execute("select * from feedback where request_id = %s", [identifier]).fetchone()

    def say(identifier: str, **form: str) -> str:
        answer = app.post(f"/requests/{identifier}/feedback", data=form)
        assert answer.status_code == 303, answer.text[:500]
        return answer.headers["location"]

    first, second, third, *_ = waiting()
    assert len(waiting()) == 10
    here = f"/review?model={MODEL}&since=24h"
    assert say(first, correction="  Return the sum, mail ada@example.org. ", answer="old", next=here) == here
    row = given(first)
    assert row is not None
    assert (row["score"], row["review"], row["correction"]) == (None, -1, "Return the sum, mail [EMAIL].")
    assert say(second, correction="as it was", answer="as it was", verdict="right") == f"/requests/{second}"
    assert (given(second) or {})["review"] == 1
    assert say(third, correction="", answer="x", verdict="wrong", next="//evil.example") == f"/requests/{third}"
    assert (given(third) or {})["review"] == -1
    left = waiting()
    assert not {first, second, third} & set(left), "each is judged once"
    page, _ = check(app, f"/requests/{third}")
    assert "Reviewed by a operator: wrong" in page
    unchanged = app.post(f"/requests/{third}/feedback", data={"correction": "x", "answer": "x"})
    assert (unchanged.status_code, "Nothing was changed" in unchanged.text) == (400, True)
    log_in(app, "viewer")
    assert waiting() == []
    refused = app.post(f"/requests/{third}/feedback", data={"verdict": "right"})
    assert refused.status_code == 403


def test_a_study_shows_each_trial_and_its_best(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    listed = check(app, "/studies")[0]
    assert [int(n) for n in re.findall(rf"/studies/{MODEL}-s(\d)", listed)] == [3, 2, 1]
    assert listed.count("1 at work") == 1
    assert listed.count("1 failed") == 3
    assert "interrupted" not in listed
    with transaction() as conn:
        conn.execute("update lease set expires_at = now() - interval '1 minute'")
    assert "interrupted" in check(app, "/studies")[0]
    page = check(app, f"/studies/{MODEL}-s3")[0]
    assert "nobody is at work: the same <code>tunesmith run</code> goes on" in page
    assert "about" not in page[page.index("<dt>Begun</dt>") : page.index("<dt>Model</dt>")]
    with transaction() as conn:
        rows = conn.execute(
            "select trial, steps, value from rung_job where study = %s and value is not null order by value",
            [f"{MODEL}-s1"],
        ).fetchall()
    page = check(app, f"/studies/{MODEL}-s1")[0]
    least = rows[0]
    assert f"loss of trial {least['trial']}, after {least['steps']} steps" in page
    table = page[page.index('id="trials"') :]
    order = [int(n) for n in re.findall(r'<th scope="row" class="nowrap">(\d+)', table)]
    assert order == [*dict.fromkeys(r["trial"] for r in rows), 8]  # by its lowest loss, then those without one
    assert [table.count(f'light">{word}<') for word in ("complete", "pruned", "failed")] == [2, 6, 1]
    assert "the loss became nan at step 3" in table
    assert [title in page for title in ("History", "Learning curves", "Parallel coordinates", "Importances")] == [
        True
    ] * 4
    assert len(re.findall(r'id="slice-\d-title"', page)) == 3  # every parameter varies
    assert page.count('class="dot trial"') + page.count('class="dot best"') == 8 + len(rows) + 3 * 8
    assert re.search(r"learning rate</text><text[^>]*>61 %", page)
    assert "/links/mlflow/" + "a" * 32 + "?show=search" in page
    assert "front-title" not in page
    second = check(app, f"/studies/{MODEL}-s2")[0]
    assert "beaten by none" in second  # it has two objectives
    assert "1 variant by hand, 1 failed" in second
    assert ">variant of 3<" in second
    assert second.count("pruned by hand<") == 1
    assert "9 of 9" in second  # a variant is on top
    running = check(app, f"/studies/{MODEL}-s3")[0]
    table = running[running.index('id="trials"') :]
    assert [table.count(f'light">{word}<') for word in ("running", "waiting", "measured", "failed")] == [1, 1, 6, 1]
    assert "importances-title" not in running  # they come when the search is over
    live = app.get(f"/studies/{MODEL}-s3", headers={"x-live": "1"}).text
    assert "history-title" in live
    assert "<html" not in live


def test_a_trial_is_where_the_command_says_it_is(app: TestClient) -> None:
    """Also while the search runs: who is out after a rung is, as soon as the others go on."""
    fill()
    log_in(app, "viewer")
    name = f"{MODEL}-s9"
    with transaction() as conn:
        studies.create(conn, name, MODEL, {"trials": 3, "rungs": [10, 30], "reduction": 3, "space": {}})
        for trial in range(3):
            studies.add_job(conn, name, trial=trial, rung=0, trial_id=trial, params={}, steps=10, checkpoint=None)
            (job,) = studies.claim(conn, name, "w")
            studies.finish(conn, job, value=abs(trial - 1.0), curve=[], checkpoint="c", tokens=1, seconds=1.0,
                           adapter_parameters=8)  # fmt: skip

    def words() -> dict[int, str]:
        page = check(app, f"/studies/{name}")[0]
        rows = re.findall(r'<th scope="row" class="nowrap">(\d+).*?light">([^<]+)<', page, re.DOTALL)
        told = json.loads(CliRunner().invoke(commands.study, ["show", name, "--json"]).output)["trials"]
        found = {int(trial): word for trial, word in rows}
        assert found == {t["trial"]: t["state"] for t in told}
        return found

    assert words() == {0: "measured", 1: "measured", 2: "measured"}
    with transaction() as conn:
        studies.add_job(conn, name, trial=1, rung=1, trial_id=1, params={}, steps=30, checkpoint="c")
    assert words() == {0: "pruned", 1: "waiting", 2: "pruned"}
    with transaction() as conn:
        studies.stop(conn, name)
    assert words() == {0: "pruned", 1: "pruned", 2: "pruned"}


def test_the_winner_is_who_was_picked_rather_than_who_had_the_lowest_loss(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    with transaction() as conn:
        rows = conn.execute(
            "select trial, steps, value from rung_job where study = %s and value is not null order by value desc",
            [f"{MODEL}-s2"],
        ).fetchall()
        picked = rows[0]
        conn.execute(
            "update study set best = jsonb_build_object('trial', %s::int, 'value', %s::float, 'steps', %s::int)"
            " where name = %s",
            [picked["trial"], picked["value"], picked["steps"], f"{MODEL}-s2"],
        )
    page = check(app, f"/studies/{MODEL}-s2")[0]
    assert f"loss of trial {picked['trial']}, after {picked['steps']} steps" in page
    assert re.findall(r'class="nowrap">(\d+) <span class="tag accent">best', page) == [str(picked["trial"])]


def test_the_request_list_filters_and_pages(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    failed = app.get("/requests?status=error&since=6h").text
    assert failed.count("/requests/0") == 2
    first = app.get("/requests?since=6h").text
    older = re.search(r'href="(\?[^"]*before=[^"]*)"', first)
    assert older
    second = app.get("/requests" + older[1].replace("&amp;", "&")).text
    ids = [set(re.findall(r"/requests/(0[0-9a-f-]{35})", text)) for text in (first, second)]
    assert [len(i) for i in ids] == [50, 50]
    assert not ids[0] & ids[1]
    assert "No request matches" in app.get("/requests?version=77").text
    assert app.get("/requests?version=99999999999999999999&before=x&since=y&slot=z").status_code == 200


def test_rare_requests_are_found_in_their_order(app: TestClient) -> None:
    """Which are read from indexes of their own, or from the feedback."""
    fill()
    log_in(app, "viewer")
    with transaction() as conn:
        conn.execute("update request_event set slot = 'shadow' where extract(second from at) < 5")
        rows = conn.execute(
            "select r.*, f.score, f.correction, f.request_id from request_event r"
            " left join feedback f on f.request_id = r.id order by r.at desc, r.id desc"
        ).fetchall()
    filters: dict[str, Callable[[dict[str, Any]], bool]] = {
        "feedback=any": lambda r: r["request_id"] is not None,
        "feedback=negative": lambda r: r["score"] is not None and r["score"] < 0,
        "feedback=corrected&status=ok": lambda r: r["correction"] is not None and r["status"] < 400,
        "slot=shadow": lambda r: r["slot"] == "shadow",
        "status=error": lambda r: r["status"] >= 400,
        f"model={MODEL}&version=1": lambda r: r["version"] == 1,
        f"model={MODEL}&version=1&feedback=any": lambda r: r["version"] == 1 and r["request_id"] is not None,
    }
    for query, fits in filters.items():
        expected, found = [str(row["id"]) for row in rows if fits(row)][:100], list[str]()
        page = f"/requests?since=30d&{query}"
        while page and len(found) < 100:
            text = app.get(page).text
            found += list(dict.fromkeys(re.findall(r"/requests/(0[0-9a-f-]{35})", text)))
            older = re.search(r'href="(\?[^"]*before=[^"]*)"', text)
            page = "/requests" + older[1].replace("&amp;", "&") if older else ""
        assert found[:100] == expected, query
        assert expected, query


def test_nothing_without_a_session(app: TestClient) -> None:
    for path in ("/", "/alerts", "/requests", f"/models/{MODEL}", "/runs", "/studies", "/studies/x", "/playground"):
        answer = app.get(path)
        assert answer.status_code == 303
        assert answer.headers["location"] == f"/login?next={path}"
    assert app.post(f"/models/{MODEL}/rollback").status_code in (401, 403)
    assert app.get("/login").status_code == 200
    assert app.get("/static/console.css").status_code == 200
    assert app.post("/login", data={"key": "ts_x_y"}).status_code == 401


@pytest.mark.parametrize("target", ["https://evil.example/", "//evil.example", "/\\evil.example", "/login?next=/"])
def test_logging_in_never_leads_to_another_site(app: TestClient, target: str) -> None:
    with transaction() as conn:
        key = create_key(conn, name="n", role="viewer").key
    assert app.post("/login", data={"key": key, "next": target}).headers["location"] == "/"


def test_a_service_key_cannot_log_in_and_a_log_out_ends_the_session(app: TestClient) -> None:
    with transaction() as conn:
        service = create_key(conn, name="app", role="service").key
    assert app.post("/login", data={"key": service}).status_code == 403
    log_in(app, "viewer")
    assert app.post("/logout").status_code == 303
    assert app.get("/").status_code == 303


def test_a_viewer_looks_and_an_operator_changes(app: TestClient) -> None:
    fill()
    log_in(app, "viewer")
    form = check(app, f"/models/{MODEL}/promote/1")[0]
    assert "The role viewer may look" in form
    assert "Promote…" not in app.get(f"/models/{MODEL}").text
    change = {"reason": "because", "generation": "4"}
    assert app.post(f"/models/{MODEL}/promote/1", data=change).status_code == 403
    assert app.post(f"/models/{MODEL}/rollback", data=change).status_code == 403
    log_in(app, "operator")
    elsewhere = app.post(
        f"/models/{MODEL}/promote/1",
        data=change,
        headers={"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    )
    assert elsewhere.status_code == 403
    with transaction() as conn:
        assert deployments.read(conn, MODEL).champion == 2
    assert "needs a reason" in app.post(f"/models/{MODEL}/promote/1", data={**change, "reason": " "}).text
    assert app.post(f"/models/{MODEL}/promote/1", data=change).status_code == 303
    with transaction() as conn:
        last = deployments.history(conn, MODEL)[-1]
        assert deployments.verify_chain(conn, MODEL) == []
    assert (last.action, last.to_version, last.reason) == ("promote", 1, "because")
    assert "(a operator)" in last.actor


def test_a_conflict_shows_what_serves_now_and_keeps_the_reason(app: TestClient) -> None:
    fill()
    log_in(app, "operator")
    assert 'name="generation" value="4"' in app.get(f"/models/{MODEL}/rollback").text
    with transaction() as conn:
        deployments.promote(conn, MODEL, 1, actor="someone", reason="faster")
    answer = app.post(f"/models/{MODEL}/rollback", data={"reason": HOSTILE, "generation": "4", "to": "1"})
    assert answer.status_code == 412
    assert "Someone changed docstring-writer first" in answer.text
    assert 'name="generation" value="5"' in answer.text
    assert "&lt;script&gt;alert" in answer.text
    with transaction() as conn:
        assert deployments.read(conn, MODEL).generation == 5
    again = app.post(f"/models/{MODEL}/rollback", data={"reason": "really", "generation": "5", "to": "2"})
    assert again.status_code == 303
    with transaction() as conn:
        assert deployments.read(conn, MODEL).champion == 2


def test_a_gate_that_did_not_pass_is_overridden_only_by_an_admin_and_on_purpose(app: TestClient) -> None:
    fill()
    path, change = "/models/support-intents/promote/1", {"reason": "we need it", "generation": "0"}
    log_in(app, "operator")
    refused = app.post(path, data=change)
    assert refused.status_code == 409
    assert "310 are needed" in refused.text
    assert "An admin may override it" in refused.text
    assert 'name="force"' not in refused.text
    forced = app.post(path, data={**change, "force": "yes"})
    assert forced.status_code == 403
    assert "Overriding a gate needs the admin role." in forced.text
    with transaction() as conn:
        assert deployments.read(conn, "support-intents").champion is None
    log_in(app, "admin")
    assert 'name="force"' in app.post(path, data=change).text
    assert app.post(path, data={**change, "force": "yes"}).status_code == 303
    assert '<span class="tag bad">forced</span>' in app.get("/models/support-intents").text


def test_a_canary_in_steps_is_begun_shown_and_stopped(app: TestClient) -> None:
    fill()
    log_in(app, "operator")
    assert f"/models/{MODEL}/rollout/1" in app.get(f"/models/{MODEL}/versions/1").text
    form = check(app, f"/models/{MODEL}/rollout/1")[0]
    assert 'value="1%, 5%, 25%, 50%"' in form
    wish = {"reason": HOSTILE, "generation": "4", "steps": "5%, 50%", "requests": "30"}
    for wrong in ({"steps": "50%, 5%"}, {"steps": HOSTILE}, {"requests": "x"}, {"generation": "3"}):
        assert app.post(f"/models/{MODEL}/rollout/1", data=wish | wrong).status_code in (400, 412)
    assert app.post(f"/models/{MODEL}/rollout/1", data=wish).status_code == 303
    with transaction() as conn:
        rollout = rollouts.newest(conn, MODEL)
        stream = Stream(bad=[1], of=[9], champion_bad=[1], champion_of=[90])
        found = decide(rollout.parsed, 0, {"errors": stream}, requests=9, in_step=timedelta(minutes=3))
        rollouts.note(conn, rollout, found.reason, [finding.to_json() for finding in found.findings])
        assert deployments.read(conn, MODEL).challenger_share == 0.05
    page = check(app, f"/models/{MODEL}")[0]
    for words in ("Canary of v1", "9 of 30 requests, 3 of 10 minutes", "answers with status 500 or more", "&lt;script"):
        assert words in page
    assert app.post(f"/models/{MODEL}/challenger/stop", data={"reason": "enough"}).status_code == 303
    with transaction() as conn:
        assert deployments.read(conn, MODEL).challenger is None
    log_in(app, "viewer")
    assert app.post(f"/models/{MODEL}/rollout/1", data=wish).status_code == 403
    assert app.post(f"/models/{MODEL}/challenger/stop", data=wish).status_code == 403
