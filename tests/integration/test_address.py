"""What becomes of requests to an OpenAI-shaped address that is slow, full, wrong, gone, or tells secrets."""

from __future__ import annotations

import time
from typing import Any

import pytest
from address_peer import Answer, serving

from infra import ports
from pipelines.config_address import Address
from pipelines.evaluation.address import Client, Unavailable

SECRET = "sk-very-secret-0123456789"


def turns(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def client(url: str, **more: Any) -> Client:
    return Client(Address(url=url, model="big", **more))


def test_answers_come_in_order_and_a_few_at_a_time() -> None:
    def echo(body: dict[str, Any]) -> Answer:
        time.sleep(0.02)
        return f"you said {body['messages'][-1]['content']}"

    done: list[int] = []
    with serving(echo, "big-2026") as peer, client(peer.url, parallel=3, options={"max_tokens": None, "seed": 1}) as c:
        said = c.ask_all(turns(*"abcdefghij"), max_tokens=7, progress=done.append)
        assert [answer.text for answer in said if answer] == [f"you said {letter}" for letter in "abcdefghij"]
        assert all(a and (a.model, a.prompt_tokens, a.completion_tokens) == ("big-2026", 1, 3) for a in said)
        assert all(answer and answer.seconds >= 0.02 for answer in said)
        assert 1 < peer.most_active <= 3
        assert done == list(range(1, 11))
        assert set(peer.bodies[0]) == {"model", "messages", "temperature", "seed"}  # what is null is not sent
        assert peer.keys == {None}


def test_a_full_address_is_waited_for_as_long_as_it_asks() -> None:
    full = iter([True, False, True, False])

    def answer(body: dict[str, Any]) -> Answer:
        return (429, {"retry-after": "0.4"}, {"error": {"message": "slow down"}}) if next(full) else "yes"

    with serving(answer) as peer, client(peer.url, parallel=1) as c:
        said = [a for a in c.ask_all(turns("a", "b"), max_tokens=4) if a]
        assert [(a.text, a.seconds >= 0.4) for a in said] == [("yes", True)] * 2, "who asked has waited too"
        assert all(later - earlier >= 0.4 for earlier, later in zip(peer.times[::2], peer.times[1::2], strict=True))
        assert dict(c.counts) == {"tried_again": 2, "answered": 2}
        assert c.in_words("it") == ["Requests to it were tried again 2 times."]


def test_one_that_asks_for_too_long_a_wait_has_no_answer() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        wanted = body["messages"][0]["content"] == "b"
        return (429, {"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, {}) if wanted else "yes"

    with serving(answer) as peer, client(peer.url) as c:
        assert [a is None for a in c.ask_all(turns("a", "b", "c"), max_tokens=4)] == [False, True, False]
        assert c.in_words("it") == ["1 of 3 requests to it have no answer (0 timed out, 1 limited, 0 failed)."]


def test_slow_garbled_and_refused_requests_are_counted_and_the_others_stand() -> None:
    def answer(body: dict[str, Any]) -> Answer:
        asked = body["messages"][0]["content"]
        if asked == "slow":
            time.sleep(0.6)
        if asked == "garbled":
            return 200, {}, b"<html>"
        return (400, {}, {"error": {"message": "too long"}}) if asked == "long" else "yes"

    with serving(answer) as peer, client(peer.url, timeout_seconds=0.3) as c:
        said = c.ask_all(turns("a", "slow", "garbled", "b", "long", "c"), max_tokens=4)
        assert [a is not None for a in said] == [True, False, False, True, False, True]
        assert (c.counts["timed_out"], c.counts["failed"], c.counts["answered"]) == (1, 2, 3)
        assert peer.asked().count("slow") == 2
        assert peer.asked().count("long") == 1


def test_an_address_that_fails_again_and_again_is_given_up() -> None:
    refusal = (400, {}, {"error": {"message": "no  temperature\nhere."}})
    with serving(lambda body: refusal) as peer, client(peer.url, parallel=1) as c:
        with pytest.raises(Unavailable) as caught:
            c.ask_all(turns(*map(str, range(50))), max_tokens=4)
        assert caught.value.why == (
            f"{peer.url} failed 6 times in a row; the last time it answered 400 (no temperature here)"
        )
        assert len(peer.bodies) == 6


def test_an_address_that_is_gone_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{ports.free()}/v1"
    with client(url) as c, pytest.raises(Unavailable) as caught:
        c.ask_all(turns("a", "b", "c"), max_tokens=4)
    assert caught.value.why.startswith(f"{url} does not answer (")
    assert "\n" not in caught.value.why


@pytest.mark.parametrize("status", [401, 404, 500, 400])
def test_the_key_is_sent_and_told_to_nobody(
    status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BIG_KEY", f"{SECRET}\n")
    caplog.set_level("DEBUG")
    echoed = (status, {}, {"error": {"message": f"Incorrect API key provided: {SECRET}"}})
    address = Address(url="http://replaced", model="big", key_env="BIG_KEY")
    with (
        serving(lambda body: echoed) as peer,
        Client(address.model_copy(update={"url": peer.url}), wait=lambda seconds: None) as c,
    ):
        with pytest.raises(Unavailable) as caught:
            c.ask_all(turns(*"abcdefgh"), max_tokens=4)
        assert peer.keys == {f"Bearer {SECRET}"}
    assert str(status) in caught.value.why
    assert SECRET not in caught.value.why
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("value", "why"),
    [(None, "holds no key"), (" ", "holds no key"), ("sk-\u00fc", "characters"), ("a\nb", "characters")],
)
def test_a_key_that_is_missing_or_cannot_be_one_is_told_by_its_variable(
    value: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIG_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("BIG_KEY", value)
    with pytest.raises(Unavailable, match=f"BIG_KEY .*{why}") as caught:
        client("http://127.0.0.1:9/v1", key_env="BIG_KEY")
    assert value is None or value == " " or value not in caught.value.why


def test_nothing_is_asked_without_an_address_or_a_model() -> None:
    with pytest.raises(Unavailable, match="no address is named"):
        Client(Address(model="big"))
    with pytest.raises(Unavailable, match="no model is named"):
        Client(Address(url="http://127.0.0.1:9"))
