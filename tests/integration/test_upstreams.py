"""Hosted versions: a gateway that asks models at two upstreams, of which one dies, refuses or talks nonsense."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_peer
import mlflow_gateway
import openai
import pytest
from address_peer import Answer, serving
from click.testing import CliRunner
from serving import Stand, add_version, child, make_stand, wait_for

from deploy.breaker import FAILURES
from deploy.routing import Place
from deploy.upstream import Busy, Upstream
from infra import ports
from infra.db import transaction
from infra.errors import NotFound, Refused, TunesmithError, UsageError
from infra.settings import Settings
from pipelines.cli import tunesmith
from registry import deployments, upstreams
from registry.bundle import Hosted, HostedModel
from registry.pricing import TokenPrice

BODY = {"messages": [{"role": "user", "content": "hello"}]}
HOSTED = Hosted(
    models=(
        HostedModel(upstream="first", model="base", options={"top_p": None, "reasoning_effort": "low"}),
        HostedModel(upstream="second", model="base"),
    ),
    price=TokenPrice(per_1k_prompt_tokens_usd=1.0, per_1k_completion_tokens_usd=10.0),
)


class Upstreams:
    """Two servers, each a process that can be killed and started again."""

    def __init__(self, home: Path) -> None:
        first = ports.free()
        self.ports = {"first": first, "second": ports.free(but=[first])}
        self.home = home
        self.running: dict[str, ExitStack] = {}

    def start(self, name: str) -> None:
        stack = self.running[name] = ExitStack()
        stack.enter_context(child(engine_peer.__file__, str(self.ports[name]), log=self.home / f"{name}.log"))
        wait_for(lambda: not ports.is_free(self.ports[name]), what=f"for {name}")

    def kill(self, name: str) -> None:
        self.running.pop(name).close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"


@pytest.fixture
def both(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstreams]:
    monkeypatch.setenv("PEER_KEY", engine_peer.SECRET)
    both = Upstreams(database.home)
    with transaction() as conn:
        for name in both.ports:
            upstreams.put(conn, name, f"{both.url(name)}/v1", key_env="PEER_KEY", timeout_seconds=5, actor="test")
    for name in both.ports:
        both.start(name)
    yield both
    for name in list(both.running):
        both.kill(name)


@contextmanager
def _serving(settings: Settings) -> Iterator[Stand]:
    """A gateway alone: nothing here has an engine. Its secret is another one than the upstreams' key."""
    add_version("demo", 1, hosted=HOSTED, system="Be kind.")
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with make_stand(settings.home) as stand, stand.running_gateway(secret="the-engines-own"):
        stand.wait_ready()
        yield stand


def _stats(stand: Stand, both: Upstreams, name: str) -> Any:
    head = {"authorization": f"Bearer {engine_peer.SECRET}"}
    return stand.http.get(f"{both.url(name)}/stats", headers=head).json()


def _open(stand: Stand, name: str) -> float | None:
    text = stand.http.get(f"{stand.url}/metrics", headers=stand.header()).text
    found = re.search(rf'tunesmith_upstream_open{{upstream="{name}/base"}} (\S+)', text)
    return float(found[1]) if found else None


def test_a_hosted_version_is_asked_priced_and_recorded_like_any(database: Settings, both: Upstreams) -> None:
    with (
        _serving(database) as stand,
        openai.OpenAI(base_url=f"{stand.url}/v1", api_key=stand.keys["service"]) as client,
    ):
        tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "hello"}],
            tools=tools,
            response_format={"type": "text"},
            extra_body={"priority": 1},
        )
        assert (answer.model, answer.choices[0].message.content) == ("demo:1", "base word0 word1")
        chunks = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hello"}], stream=True
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "base word0 word1"
        stand.ask(text="newer", max_completion_tokens=5)
        (newer,) = (b for b in _stats(stand, both, "first")["bodies"] if b["messages"][-1]["content"] == "newer")
        assert newer["max_completion_tokens"] == 5
        assert "max_tokens" not in newer
        look: Any = [
            {"type": "text", "text": "what is this"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        ]
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": look}])
        assert _stats(stand, both, "first")["bodies"][-1]["messages"][-1]["content"] == look
        body = next(b for b in _stats(stand, both, "first")["bodies"] if "tools" in b)
        assert (body["model"], body["tools"], body["reasoning_effort"]) == ("base", tools, "low")
        assert body["response_format"] == {"type": "text"}
        assert body["messages"][0] == {"role": "system", "content": "Be kind."}
        assert not {"top_p", "priority"} & body.keys(), "which is null, and which only engines know"
        assert _stats(stand, both, "second")["bodies"] == []
        for event in stand.wait_events(4):
            assert (event["version"], event["slot"], event["status"]) == (1, "champion", 200)
            assert event["cost_usd"] == pytest.approx((5 * 1.0 + 3 * 10.0) / 1000)


def test_mlflows_gateway_may_stand_between(database: Settings, both: Upstreams, mlflow_process: str) -> None:
    """As any other real one; what it says of a model that is gone is not passed on where another is left."""
    url = mlflow_gateway.add_endpoint(mlflow_process, "base", f"{both.url('first')}/v1", engine_peer.SECRET)
    with transaction() as conn:
        upstreams.put(conn, "first", url, key_env="PEER_KEY", timeout_seconds=30, actor="test")
    with _serving(database) as stand:
        for stream in (False, True):
            answer = stand.ask(stream=stream)
            assert (answer.status_code, answer.headers["x-tunesmith-version"]) == (200, "demo:1"), answer.text
        passed = _stats(stand, both, "first")["bodies"]
        assert {body["reasoning_effort"] for body in passed} == {"low"}
        assert [event["completion_tokens"] for event in stand.wait_events(2)] == [3, 3]
        both.kill("first")
        assert [stand.ask(stream=stream).status_code for stream in (False, True)] == [200, 200]
        assert _stats(stand, both, "second")["answered"] == 2


def test_an_upstream_that_dies_is_not_noticed_by_clients_and_is_asked_again_when_it_is_back(
    database: Settings, both: Upstreams
) -> None:
    with _serving(database) as stand:
        assert stand.ask().status_code == 200
        both.kill("first")
        for number in range(4 * FAILURES):
            assert stand.ask(stream=bool(number % 2)).status_code == 200
        assert _open(stand, "first") in (1.0, 0.5)
        assert _open(stand, "second") == 0
        assert _stats(stand, both, "second")["answered"] == 4 * FAILURES

        both.kill("second")
        wait_for(lambda: stand.ask().status_code == 503 and "again and again" in stand.ask().json()["error"]["message"])
        refused = stand.ask()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        both_failed = "first/base and second/base failed again and again."
        assert refused.json()["error"]["message"] == both_failed

        both.start("first")
        wait_for(lambda: stand.ask().status_code == 200, 40, "for the first to be asked again")
        wait_for(lambda: _open(stand, "first") == 0, 5)
        before = _stats(stand, both, "first")["answered"]
        assert [stand.ask().status_code for _ in range(5)] == [200] * 5
        assert _stats(stand, both, "first")["answered"] == before + 5


def test_an_engine_without_time_for_background_requests_is_not_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since others may keep it busy; one that does not answer these is."""
    monkeypatch.setattr("deploy.upstream.ANSWER_SECONDS", 0.2)

    async def asked(url: str, priority: int) -> tuple[set[type], str]:
        upstream = Upstream(None)
        await upstream.open()
        engine = Place(name="engine", url=url, model="m")
        served: Any = SimpleNamespace(hosted=None, name="demo:1", adapter_path=None)
        body = {"messages": [{"role": "user", "content": "hello"}], "priority": priority}
        said = set()
        try:
            for _ in range(FAILURES):
                with pytest.raises(TunesmithError) as failed:
                    await upstream.complete([engine], served, "/chat/completions", body)
                said.add(failed.type)
            return said, upstream.breakers["engine"].state
        finally:
            await upstream.close()

    def late(body: dict[str, Any]) -> Answer:
        time.sleep(1.0)
        return "late"

    with serving(late) as peer:
        url = peer.url.removesuffix("/v1")
        assert asyncio.run(asked(url, 1)) == ({Busy}, "closed")
        said, state = asyncio.run(asked(url, 0))
        assert Busy not in said
        assert state != "closed"


def test_what_befalls_copies_keeps_no_clients_request_away() -> None:
    """Nor are copies sent where clients' requests are not: an upstream that wants a pause gets it."""

    async def asked(url: str) -> list[str]:
        upstream = Upstream(None)
        await upstream.open()
        place = Place(name="first", url=url, model="m", hosted=True)
        served: Any = SimpleNamespace(hosted=HOSTED, name="demo:1")
        said = []
        try:
            for copy in (True, False, True):
                if copy and said:
                    upstream._breaker(place).pause(30)
                try:
                    await upstream.complete([replace(place, copy=copy)], served, "/chat/completions", BODY)
                    said.append("answered")
                except Busy:
                    said.append("busy")
            return said
        finally:
            await upstream.close()

    turns: Iterator[Answer] = iter([(429, {}, {"error": {"message": "slow down"}}), "well"])
    with serving(lambda _: next(turns)) as peer:
        assert asyncio.run(asked(peer.url)) == ["busy", "answered", "busy"]
        assert len(peer.bodies) == 2


def test_another_place_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause is for who is asked again."""
    monkeypatch.setattr("deploy.upstream.random.uniform", lambda *_: pytest.fail("nobody is asked a second time"))

    async def asked(urls: list[str]) -> Any:
        upstream = Upstream(None)
        await upstream.open()
        places = [Place(name=url, url=url, model="m", hosted=True) for url in urls]
        served: Any = SimpleNamespace(hosted=HOSTED, name="demo:1")
        try:
            return await upstream.complete(places, served, "/chat/completions", BODY)
        finally:
            await upstream.close()

    with serving(lambda _: (500, {}, {})) as first, serving(lambda _: "second") as second:
        answer = asyncio.run(asked([first.url, second.url]))
    assert answer["choices"][0]["message"]["content"] == "second"


def test_each_place_is_asked_once_before_any_is_asked_again() -> None:
    """The first is left alone; the second does not answer in time; the third does."""

    async def asked(urls: dict[str, str]) -> Any:
        upstream = Upstream(None)
        await upstream.open()
        places = [Place(name=name, url=url, model="m", hosted=True, seconds=0.3) for name, url in urls.items()]
        for _ in range(FAILURES):
            upstream._breaker(places[0]).failed()
        served: Any = SimpleNamespace(hosted=HOSTED, name="demo:1")
        try:
            body = {"messages": [{"role": "user", "content": "hello"}]}
            return await upstream.complete(places, served, "/chat/completions", body)
        finally:
            await upstream.close()

    def late(body: dict[str, Any]) -> Answer:
        time.sleep(1.0)
        return "late"

    with serving(lambda _: "first") as first, serving(late) as second, serving(lambda _: "third") as third:
        peers = {"first": first, "second": second, "third": third}
        answer = asyncio.run(asked({name: peer.url for name, peer in peers.items()}))
        assert answer["choices"][0]["message"]["content"] == "third"
        assert [len(peer.bodies) for peer in peers.values()] == [0, 1, 1]


def test_garbage_refusals_and_breaks_end_in_clear_errors(database: Settings, both: Upstreams) -> None:
    with _serving(database) as stand:
        garbage = stand.ask(text="garbage")
        assert (garbage.status_code, garbage.json()["error"]["code"]) == (502, "upstream")
        assert (
            garbage.json()["error"]["message"] == "The upstream first/base did not answer in JSON."
        )  # the last of three
        assert (
            len([b for b in _stats(stand, both, "second")["bodies"] if b["messages"][-1]["content"] == "garbage"]) == 1
        )
        assert stand.ask().status_code == 200
        failed = stand.ask(text="fail")
        assert failed.status_code == 502
        assert "failed with status 500: fail" in failed.json()["error"]["message"]
        broken = stand.ask(text="break", stream=True)
        assert broken.status_code == 200  # it had begun
        assert '"code":"upstream"' in broken.text
        assert "broke off in the middle" in broken.text
        full = stand.ask(text="full")
        assert (full.status_code, full.json()["error"]["code"]) == (429, "busy")
        assert int(full.headers["retry-after"]) >= 1
        again = stand.ask()  # both have asked for a pause of a second
        assert again.status_code == 429
        assert "had too many requests" in again.json()["error"]["message"]
        wait_for(lambda: stand.ask().status_code == 200, 10)


def test_a_key_that_is_not_there_or_wrong_is_somebody_elses_trouble(
    database: Settings, both: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG_KEY", "sk-secret-of-mine")
    with transaction() as conn:
        upstreams.put(conn, "first", f"{both.url('first')}/v1", key_env="NOT_THERE", actor="test")
    with _serving(database) as stand:
        assert stand.ask().status_code == 200
        assert _stats(stand, both, "first")["bodies"] == []
        with transaction() as conn:
            for name in both.ports:
                upstreams.put(conn, name, f"{both.url(name)}/v1", key_env="WRONG_KEY", actor="test")
        wait_for(lambda: stand.ask().status_code == 502, 10, "for the new addresses")
        said = stand.ask().text
        assert "refuses the key" in said
        log = (stand.home / "gateway.log").read_text()
        for text in (said, log):
            assert "sk-secret" not in text
        with transaction() as conn:
            upstreams.put(conn, "second", f"{both.url('second')}/v1", key_env="PEER_KEY", actor="test")
        wait_for(lambda: stand.ask().status_code == 200, 10, "for the right key")


def test_what_an_upstream_says_is_taken_with_care(
    database: Settings, both: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are not repeated, and what is no text, or no count, is no answer and no crash."""
    key = "sk-secret-of-mine"
    monkeypatch.setenv("OTHER_KEY", key)

    def answer(body: dict[str, Any]) -> Answer:
        asked = body["messages"][-1]["content"]
        if asked == "quote":
            words = f"the key {key} may not ask this"
            return 400, {}, {"error": {"message": words, "code": "context_length_exceeded", "param": f"<{key}>"}}
        said: Any = [{"type": "text", "text": "hello"}] if asked == "list" else "hello"
        counts = {"counts": {"prompt_tokens": -3, "completion_tokens": 10**30}, "usage": {"prompt_tokens": "many"}}
        usage = {"usage": counts[asked]} if asked in counts else {}
        choices = [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]
        return 200, {}, {"id": "x", "choices": choices, **usage}

    with serving(answer) as peer:
        with transaction() as conn:
            for name in both.ports:
                upstreams.put(conn, name, peer.url, key_env="OTHER_KEY", actor="test")
        with _serving(database) as stand:
            quoted = stand.ask(text="quote")
            assert (quoted.status_code, quoted.json()["error"]["message"]) == (400, "the key *** may not ask this")
            assert (quoted.json()["error"]["code"], quoted.json()["error"]["param"]) == (
                "context_length_exceeded",
                None,
            )
            assert peer.keys == {f"Bearer {key}"}
            assert stand.ask(text="plain").json()["choices"][0]["message"]["content"] == "hello"
            counted = stand.ask(text="counts")
            assert counted.status_code == 200
            passed = stand.ask(text="plain", top_k=3, response_format={"type": "text"})
            assert (passed.status_code, peer.bodies[-1]["top_k"]) == (200, 3)
            dearer = stand.ask(text="plain", fallbacks=["a-dearer-model"])  # LiteLLM's
            assert (dearer.status_code, dearer.json()["error"]["param"]) == (400, "fallbacks")
            for nonsense in ("list", "usage"):
                refused = stand.ask(text=nonsense)
                assert (refused.status_code, refused.json()["error"]["code"]) == (502, "upstream")
            events = stand.wait_events(7)
            assert sorted(event["status"] for event in events) == [200, 200, 200, 400, 400, 502, 502]
            assert [event["prompt_tokens"] for event in events if event["completion_tokens"] > 10**6] == [
                1 + len("counts") // 4
            ], "what nobody counted is estimated"
            assert key not in (stand.home / "gateway.log").read_text()
            # Where only one talks nonsense, the other is asked
            with transaction() as conn:
                upstreams.put(conn, "second", f"{both.url('second')}/v1", key_env="PEER_KEY", actor="test")
            wait_for(lambda: stand.ask(text="list").status_code == 200, 10, "for the other one")
            assert stand.ask(text="usage", stream=True).status_code == 200


def test_addresses_by_command(database: Settings) -> None:
    runner = CliRunner()

    def run(*arguments: str) -> str:
        done = runner.invoke(tunesmith, ["upstream", *arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    assert "There is no upstream" in run("list")
    shown = run("set", "first", "--url", "https://api.example.org/v1/chat/completions", "--key-env", "EXAMPLE_KEY")
    assert "https://api.example.org/v1 " in shown
    assert "EXAMPLE_KEY" in shown
    for wrong in (
        ("set", "Bad Name", "--url", "https://x.org"),
        ("set", "x", "--url", "ftp://x.org"),
        ("set", "x", "--url", "https://ann:secret@x.org"),
        ("set", "x", "--url", "https://x.org", "--key-env", "sk-secret"),
    ):
        with pytest.raises(UsageError) as error:
            run(*wrong)
        assert "secret" not in error.value.message
    with pytest.raises(NotFound):
        run("remove", "second")
    run("set", "second", "--url", "http://127.0.0.1:1/v1")
    add_version("demo", 1, hosted=HOSTED)
    with transaction() as conn:
        deployments.promote(conn, "demo", 1, actor="test", reason="test", force=True)
    with pytest.raises(Refused, match="demo:1"):
        run("remove", "second")
    assert "demo" in run("list")
