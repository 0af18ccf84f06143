"""The gateway over our own engine: two processes, a real base, real adapters."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_peer
import httpx
import openai
import pytest
from lora import save_adapter, save_base
from serving import Stand, add_version, child, make_stand, wait_for

from infra.db import transaction
from infra.settings import Settings
from registry import bases, deployments

MESSAGES: Any = [{"role": "user", "content": "the cat sat on the mat"}]


@dataclass(frozen=True, kw_only=True)
class Real:
    stand: Stand
    texts: dict[str, str]  # what each version answers to MESSAGES


@pytest.fixture
def real(database: Settings, tmp_path: Path) -> Iterator[Real]:
    """Model ``demo`` with versions 1 and 2, which answer differently; 1 serves."""
    base = bases.resolve(str(save_base(tmp_path / "base")))
    model = bases.load_model(base.folder, "float32")
    for number in (1, 2):
        adapter = save_adapter(model, tmp_path / f"adapter{number}", seed=number)
        add_version("demo", number, base=base.digest, adapter=adapter)
    promote(1)
    with make_stand(database.home) as stand:
        with transaction() as conn:
            conn.execute("delete from engine")
        engine = ("-m", "pipelines.cli", "engine", "--base", base.digest, "--port", stand.engine_url.rsplit(":")[-1])
        environment = {"TUNESMITH_ENGINE_SECRET": engine_peer.SECRET, "OMP_NUM_THREADS": "1"}
        with child(*engine, log=database.home / "engine.log", **environment), stand.running_gateway():
            wait_for(lambda: stand._status() == 200, 120, f"for gateway and engine, see {database.home}")
            texts = {f"demo:{n}": stand.ask(f"demo:{n}", MESSAGES[0]["content"], temperature=0) for n in (1, 2)}
            said = {name: answer.json()["choices"][0]["message"]["content"] for name, answer in texts.items()}
            assert said["demo:1"] != said["demo:2"]
            yield Real(stand=stand, texts=said)


def promote(number: int) -> None:
    with transaction() as conn:
        deployments.promote(conn, "demo", number, actor="test", reason="test", force=True)


def test_real_answers_and_promotions(real: Real) -> None:
    stand = real.stand
    with openai.OpenAI(base_url=f"{stand.url}/v1", api_key=stand.keys["service"], max_retries=0) as client:
        whole = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0)
        assert whole.choices[0].message.content == real.texts["demo:1"]
        assert whole.usage is not None
        chunks = list(
            client.chat.completions.create(
                model="demo", messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == real.texts["demo:1"]
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "word " * 5000}])
        long = "many characters of one word, which are refused before they are counted in tokens " * 10_000
        with pytest.raises(openai.BadRequestError, match=r"has [\d,]+ characters, which is more than") as refused:
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": long}])
        assert refused.value.code == "context_length_exceeded"
        several = client.completions.create(model="demo", prompt=["the cat", "a rat"], max_tokens=3, temperature=0)
        alone = [client.completions.create(model="demo", prompt=text, max_tokens=3, temperature=0).choices[0].text
                 for text in ("the cat", "a rat")]  # fmt: skip
        assert [choice.text for choice in several.choices] == alone
        tokens = client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=3)
        assert tokens.usage is not None
        assert tokens.usage.prompt_tokens == 3
        for wrong in ([], ["the cat"] * 9, [["a"]], [1.5]):
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model="demo", prompt=wrong, max_tokens=3)  # type: ignore[arg-type]
            assert refused.value.param == "prompt"
    events = [e for e in stand.wait_events(14) if e["status"] == 200 and e["slot"] == "champion"]
    for event in (e for e in events if e["ttft_ms"] and e["completion_tokens"] != 3 and e["completion_tokens"] != 6):
        assert event["engine_seconds"] > 0
        assert event["ttft_ms"] > 0
        assert event["completion_tokens"] == whole.usage.completion_tokens
        assert any(value < 0 for value in event["features"]), "the answer's mean log-probability"
    _copies_while_requests_run(real)
    _promotions_while_requests_run(real)


def _copies_while_requests_run(real: Real) -> None:
    """Copies are made in the moments that clients leave, and say what they would say to them."""
    stand = real.stand
    with transaction() as conn:
        conn.execute('update model set settings = \'{"monitoring": {"keep_text": true}}\'')
        deployments.shadow(conn, "demo", 2, actor="test")

    def copies() -> list[dict[str, Any]]:
        return [e for e in stand.events() if e["slot"] == "shadow" and e["status"] == 200]

    def ask(_: int) -> httpx.Response:
        return stand.ask(text=MESSAGES[0]["content"], temperature=0)

    wait_for(lambda: ask(0).status_code == 200 and copies(), what="for the first copy")
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(ask, range(60)))
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {real.texts["demo:1"]}
    wait_for(lambda: len(copies()) >= 9, what="for copies")
    assert {e["answer"] for e in copies() if e["answer"] is not None} == {real.texts["demo:2"]}
    assert {e["status"] for e in stand.events() if e["slot"] == "shadow"} == {200}
    with transaction() as conn:
        deployments.stop(conn, "demo", "shadow", actor="test")


def _promotions_while_requests_run(real: Real) -> None:
    stop = threading.Event()
    answers: list[tuple[int, str, str]] = []

    def load() -> None:
        with httpx.Client(trust_env=False, timeout=60) as http:
            while not stop.is_set():
                body = {"model": "demo", "messages": MESSAGES}
                answer = http.post(
                    f"{real.stand.url}/v1/chat/completions", json=body | {"temperature": 0}, headers=real.stand.header()
                )
                text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
                answers.append((answer.status_code, answer.headers.get("x-tunesmith-version", ""), text))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in (2, 1, 2, 1, 2):
        time.sleep(0.3)
        promote(number)
        wait_for(lambda number=number: answers and answers[-1][1] == f"demo:{number}")  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join()
    assert len(answers) > 10
    for status, version, text in answers:
        assert status == 200, text
        assert text == real.texts[version]
    assert {version for _, version, _ in answers} == {"demo:1", "demo:2"}
