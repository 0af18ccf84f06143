"""The webhook: signed, in order, at least once; and nothing goes to where nobody outside may be (fault 22)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from version_rows import add_versions

from infra.db import one, transaction
from infra.errors import NotFound, Refused, TunesmithError, Unreachable, UsageError
from infra.settings import Settings, get_settings
from monitoring import alerts, commands, watch
from monitoring.alerts import Finding
from registry import deployments, notifications

SECRET = "a secret that both of us know"
WHO: dict[str, Any] = {"actor": "os:t@here", "reason": "because"}


@dataclass
class Receiver:
    url: str
    statuses: list[int] = field(default_factory=list)  # what the next requests get; then 200
    got: list[dict[str, Any]] = field(default_factory=list)
    refused: int = 0
    slack: list[str] = field(default_factory=list)
    seconds: float = 0.0  # that it takes for an answer


@pytest.fixture
def receiver(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A server that takes what is rightly signed, and two versions to promote."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/slack":
                assert self.headers["webhook-signature"] is None
                made.slack.append(json.loads(body)["text"])
                self.send_response(200)
                self.end_headers()
                return
            time.sleep(made.seconds)
            status = made.statuses.pop(0) if made.statuses else 200
            name, at = self.headers["webhook-id"], self.headers["webhook-timestamp"]
            right = hmac.new(SECRET.encode(), f"{name}.{at}.".encode() + body, hashlib.sha256).digest()
            assert self.headers["webhook-signature"] == "v1," + base64.b64encode(right).decode()
            if status == 200:
                made.got.append(json.loads(body) | {"id": name})
            else:
                made.refused += 1
            self.send_response(status)
            self.send_header("location", made.url)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Receiver(url=f"http://127.0.0.1:{server.server_address[1]}/hook?a=1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("TUNESMITH_WEBHOOK_URL", made.url)
        monkeypatch.setenv("TUNESMITH_WEBHOOK_SECRET", SECRET)
        monkeypatch.setenv("TUNESMITH_ALLOW_PRIVATE_WEBHOOKS", "true")
        get_settings.cache_clear()
        add_versions("m", "pass", "pass", "pass")
        yield made
        server.shutdown()


def promote(number: int) -> None:
    with transaction() as conn:
        deployments.promote(conn, "m", number, **WHO)


def deliver() -> int:
    with transaction() as conn:
        return notifications.deliver(conn)


def again() -> None:
    with transaction() as conn:
        conn.execute("update notification set next_attempt_at = now()")


def test_each_change_is_told_once_signed_and_in_order(receiver: Receiver) -> None:
    promote(1)
    with transaction() as conn:
        deployments.canary(conn, "m", 2, share=0.1, **WHO)
        deployments.stop(conn, "m", "challenger", **WHO)
    with transaction() as conn:
        deployments.promote(conn, "m", 3, **WHO)
        conn.rollback()  # what never happened is never told
    watcher = watch.Watcher("test")
    watcher.turn()
    watcher.notify()
    watcher.release()
    assert [(each["data"]["generation"], each["data"]["action"]) for each in receiver.got] == [
        (1, "promote"), (2, "canary"), (3, "stop"),
    ]  # fmt: skip
    first = receiver.got[0]
    assert (first["type"], first["id"], first["data"]["to"], first["data"]["reason"]) == (
        "deployment.changed", "ledger-m-1", 1, "because",
    )  # fmt: skip
    assert receiver.got[1]["data"]["previous_hash"] == first["data"]["hash"]
    assert deliver() == 0


def test_what_fails_is_told_again_and_keeps_its_place(receiver: Receiver) -> None:
    receiver.statuses = [503, 302]
    promote(1)
    promote(2)
    assert (deliver(), receiver.refused) == (0, 1)  # the second waits behind the first
    assert (deliver(), receiver.refused) == (0, 1)  # not at once
    again()
    assert (deliver(), receiver.refused) == (0, 2)  # a redirect is followed nowhere
    again()
    assert deliver() == 2
    assert [each["data"]["generation"] for each in receiver.got] == [1, 2]
    with transaction() as conn:
        rows = conn.execute("select attempts, error from notification where target = 'webhook' order by id").fetchall()
        assert [(row["attempts"], row["error"]) for row in rows] == [(3, None), (1, None)]
        conn.execute("update notification set done_at = now() - interval '40 days' where generation = 1")
        notifications.drop_old(conn, 30)
        assert one(conn, "select count(*) as n from notification where target = 'webhook'")["n"] == 1


def test_what_comes_later_does_not_overtake_what_failed(receiver: Receiver) -> None:
    receiver.statuses = [503]
    promote(1)
    assert (deliver(), receiver.refused) == (0, 1)
    promote(2)  # the receiver is back, and the first is to be tried again later
    assert (deliver(), receiver.refused, receiver.got) == (0, 1, [])
    again()
    assert deliver() == 2
    assert [each["data"]["generation"] for each in receiver.got] == [1, 2]


def test_what_can_never_be_told_is_given_up(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.statuses = [500]
    promote(1)
    promote(2)
    with transaction() as conn:
        conn.execute("update notification set attempts = 59 where generation = 1")
    assert deliver() == 1
    assert "never told of ledger-m-1" in caplog.text
    assert [each["data"]["generation"] for each in receiver.got] == [2]


def test_a_slow_receiver_does_not_hold_up_the_watcher(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(1)
    promote(2)
    monkeypatch.setattr(notifications, "_SECONDS", 2.0)
    receiver.seconds = 1.2
    promote(3)
    assert deliver() == 2, "the third is not begun: two seconds are over"
    assert deliver() == 1
    assert [each["data"]["generation"] for each in receiver.got] == [1, 2, 3]


def test_a_crash_after_the_telling_tells_it_again_under_the_same_id(receiver: Receiver) -> None:
    promote(1)
    with transaction() as conn:
        assert notifications.deliver(conn) == 1
        conn.rollback()
    assert deliver() == 1
    assert [each["id"] for each in receiver.got] == ["ledger-m-1", "ledger-m-1"]


PRIVATE = [
    "http://127.0.0.1:9/", "http://localhost/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/",
    "http://192.168.1.1/", "http://172.16.0.1/", "http://100.64.0.1/", "http://0.0.0.0/", "http://[::1]/",
    "http://[::ffff:169.254.169.254]/", "http://[fd00:ec2::254]/", "http://[fe80::1]/", "http://[64:ff9b::a9fe:a9fe]/",
    "http://[2002:a9fe:a9fe::1]/", "http://2130706433/", "http://0x7f.1/", "http://224.0.0.1/", "http://255.255.255.255/",
]  # fmt: skip


def test_private_addresses_are_refused_unless_allowed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_ALLOW_PRIVATE_WEBHOOKS", "false")
    get_settings.cache_clear()
    for url in [*PRIVATE, receiver.url]:
        with pytest.raises(TunesmithError) as told:
            notifications.send(url, {}, sign_as="x")
        # A kernel without IPv6 does not know such addresses at all
        assert isinstance(told.value, Refused | Unreachable), url
        assert "private or reserved" in told.value.message or "is not known" in told.value.message, url
    promote(1)
    assert deliver() == 0
    assert receiver.got == []
    with transaction() as conn:
        assert "private or reserved" in one(conn, "select error from notification where target = 'webhook'")["error"]
    assert all(notifications._public(text) for text in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"))
    assert not any(notifications._public(text) for text in ("::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "fe80::1%eth0"))


def test_without_a_webhook_nobody_is_told(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_WEBHOOK_URL")
    get_settings.cache_clear()
    promote(1)
    assert deliver() == 0
    monkeypatch.setenv("TUNESMITH_WEBHOOK_URL", receiver.url)
    get_settings.cache_clear()
    promote(2)
    assert deliver() == 1
    assert [each["data"]["generation"] for each in receiver.got] == [2]


@pytest.fixture
def slack(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Receiver:
    """The same server, which takes Slack's messages too; and the console has an address."""
    monkeypatch.setenv("TUNESMITH_SLACK_URL", receiver.url.replace("/hook?a=1", "/slack"))
    monkeypatch.setenv("TUNESMITH_GATEWAY_URL", "http://127.0.0.1:8080/")
    get_settings.cache_clear()
    return receiver


def judge(rule: str, state: Any, **more: Any) -> None:
    with transaction() as conn:
        alerts.apply(conn, "m", 2, [Finding(rule=rule, state=state, message="m:2: it is <slow> & late", **more)])


def test_alerts_are_told_when_they_open_and_when_they_are_over(slack: Receiver) -> None:
    for state in ("over", "over", "between", "calm", "calm"):
        judge("p95_latency_ms above", state, severity="critical")
        deliver()
    assert [each["type"] for each in slack.got] == ["alert.opened", "alert.closed"]
    opened, closed = (each["data"] for each in slack.got)
    assert (opened["rule"], opened["severity"], opened["version"], opened["closed_at"]) == (
        "p95_latency_ms above", "critical", 2, None,
    )  # fmt: skip
    assert closed["closed_at"] is not None
    with transaction() as conn:
        [alert] = alerts.listing(conn, "m", closed=True)
    assert opened["url"] == closed["url"] == f"http://127.0.0.1:8080/alerts/{alert['id']}"
    assert len({each["id"] for each in slack.got}) == 2
    link = f"<{opened['url']}|what happened>"
    assert slack.slack == [
        f"*CRITICAL*: Some answers are slow. m:2: it is &lt;slow&gt; &amp; late {link}",
        f"*CRITICAL* is over: Some answers are slow. m:2: it is &lt;slow&gt; &amp; late {link}",
    ]


def test_changes_are_told_to_slack_in_words(slack: Receiver) -> None:
    promote(1)
    with transaction() as conn:
        deployments.canary(conn, "m", 2, share=0.1, actor="os:t@here")
    deliver()
    page = " <http://127.0.0.1:8080/models/m|the model>"
    assert slack.slack == [
        f"m: promote: champion none -&gt; 1, by os:t@here: because{page}",
        f"m: canary 10 %: challenger none -&gt; 2, by os:t@here{page}",
    ]
    assert len(slack.got) == 2


def test_a_slack_that_is_away_holds_up_no_webhook(slack: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_SLACK_URL", "http://127.0.0.1:9/")
    get_settings.cache_clear()
    promote(1)
    assert deliver() == 1
    monkeypatch.setenv("TUNESMITH_SLACK_URL", slack.url.replace("/hook?a=1", "/slack"))
    get_settings.cache_clear()
    again()
    assert (deliver(), len(slack.slack), len(slack.got)) == (1, 1, 1)


def test_nobody_is_told_of_what_is_silenced_or_mere_information(slack: Receiver) -> None:
    judge("cost_usd above", "over", severity="info")
    silence = CliRunner().invoke(commands.silence, ["m", "--rule", "drift", "--for", "2h", "--reason", "known"])
    assert silence.exit_code == 0
    judge("drift", "over")
    judge("error_rate above", "over")
    deliver()
    assert [each["data"]["rule"] for each in slack.got] == ["error_rate above"]
    listed = CliRunner().invoke(commands.alerts, []).output
    assert "nobody is told of m: drift until" in listed
    assert listed.count("open  ") == 3  # they are there all the same
    judge("drift", "calm")
    deliver()
    assert len(slack.got) == 1  # nor that it is over, what nobody was told of
    judge("drift", "over")
    assert "1 silence ended" in CliRunner().invoke(commands.silence, ["m", "--off"]).output
    judge("drift", "over")
    deliver()
    assert [each["data"]["rule"] for each in slack.got] == ["error_rate above", "drift"]  # told once it is wanted
    CliRunner().invoke(commands.silence, ["m", "--for", "2h", "--reason", "known"])
    judge("drift", "calm")
    deliver()
    assert slack.got[-1]["type"] == "alert.closed"  # who was told waits for it
    rule = CliRunner().invoke(commands.silence, ["m", "--rule", "error_rate", "--for", "2h", "--reason", "x"])
    assert "Nobody is told of m's alerts on error_rate above until" in rule.output
    assert "0 silences ended" in CliRunner().invoke(commands.silence, ["m", "--off", "--rule", "drift"]).output
    assert "1 silence ended" in CliRunner().invoke(commands.silence, ["m", "--off", "--rule", "error_rate"]).output
    unknown = ["m", "--rule", "p95", "--for", "2h", "--reason", "x"]
    for wrong in (
        ["m", "--for", "2h"], ["m", "--for", "soon", "--reason", "x"], ["m"], ["m", "--off", "--for", "2h"], unknown,
    ):  # fmt: skip
        assert isinstance(CliRunner().invoke(commands.silence, wrong).exception, UsageError), wrong
    assert isinstance(CliRunner().invoke(commands.silence, ["none", "--off"]).exception, NotFound)


def test_who_was_told_hears_the_end_though_it_got_worse_in_silence(slack: Receiver) -> None:
    judge("drift", "over", severity="warning")
    CliRunner().invoke(commands.silence, ["m", "--for", "2h", "--reason", "known"])
    judge("drift", "over", severity="critical")
    judge("drift", "calm")
    deliver()
    assert [(each["type"], each["data"]["severity"]) for each in slack.got] == [
        ("alert.opened", "warning"), ("alert.closed", "critical"),
    ]  # fmt: skip


def test_a_secret_may_be_base64() -> None:
    key = base64.b64encode(b"k" * 24).decode()
    assert notifications.signature(f"whsec_{key}", "n", "1", b"{}") == notifications.signature(
        "k" * 24, "n", "1", b"{}"
    )
