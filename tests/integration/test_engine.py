"""The engine as a process: vLLM's contract, held by any server behind an address, and what is our own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from lora import save_adapter, save_base

from infra.storage import file_digest

SECRET = "of the tests"
ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Running:
    """An engine, the base's own name there, and adapter folders that it can read."""

    url: str
    base: str
    adapters: dict[str, Path]
    secret: str = SECRET

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.secret}"}, trust_env=False, timeout=60
        )

    def load(self, name: str, folder: str | None = None) -> httpx.Response:
        path = str(self.adapters[folder or name])
        with self.client() as client:
            return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def start(base: str, home: Path, *more: str, **env: str) -> tuple[subprocess.Popen[str], str]:
    """Start an engine on a free port; returns it, and its address as it says it in the log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "engine", "--base", base, "--rows", str(ROWS), *more],
        env={
            **os.environ,
            "TUNESMITH_HOME": str(home),
            "TUNESMITH_ENGINE_SECRET": SECRET,
            "PYTHONSAFEPATH": "1",
            **env,
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if ": base " in line:
            url = line.split(" at ")[1].split(": ")[0]
            break
    else:
        raise AssertionError("".join(said))
    threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
    for _ in range(1200):
        try:
            if httpx.get(f"{url}/health", trust_env=False, timeout=60).status_code == 200:
                return process, url
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError("the engine does not answer")


def _drain(stream: Any) -> None:
    with stream:
        for _ in stream:
            pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from deploy.decoding import open_model

    root = tmp_path_factory.mktemp("engine")
    model, _ = open_model(save_base(root / "base"))
    adapters = {f"cats-v{i}": save_adapter(model, root / f"cats-v{i}", seed=i, r=4 * i) for i in (1, 2, 3)}
    return {"base": root / "base"} | adapters


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    process, url = start(str(folders["base"]), tmp_path_factory.mktemp("home"))
    yield Running(url=url, base="base", adapters={name: path for name, path in folders.items() if name != "base"})
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


CHAT = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 12, "temperature": 0}


class EngineContract:
    """What the gateway relies on. A subclass gives the fixture `engine`."""

    def test_health_needs_no_secret_and_all_else_does(self, engine: Running) -> None:
        with httpx.Client(base_url=engine.url, trust_env=False) as nobody:
            assert nobody.get("/health").status_code == 200
            assert nobody.get("/v1/models").status_code == 401
            assert nobody.post("/v1/chat/completions", json=CHAT | {"model": engine.base}).status_code == 401

    def test_chat_answers_in_openai_shape(self, engine: Running) -> None:
        with engine.client() as client:
            answer = client.post("/v1/chat/completions", json=CHAT | {"model": engine.base}).raise_for_status().json()
        choice, usage = answer["choices"][0], answer["usage"]
        assert answer["object"] == "chat.completion"
        assert answer["model"] == engine.base
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")
        assert 1 <= usage["completion_tokens"] <= 12
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    def test_a_stream_says_what_the_whole_answer_says(self, engine: Running) -> None:
        body = CHAT | {"model": engine.base, "max_tokens": 60}
        with engine.client() as client:
            whole = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            streamed = {"stream": True, "stream_options": {"include_usage": True}}
            with client.stream("POST", "/v1/chat/completions", json=body | streamed) as response:
                assert response.headers["content-type"].startswith("text/event-stream")
                parts = chunks(response)
        text = "".join(c["delta"].get("content") or "" for part in parts for c in part["choices"])
        assert text == whole["choices"][0]["message"]["content"]
        assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
        assert parts[-1]["choices"] == []
        assert parts[-1]["usage"] == whole["usage"]
        assert [c["finish_reason"] for part in parts for c in part["choices"] if c["finish_reason"]] == [
            whole["choices"][0]["finish_reason"]
        ]

    def test_text_completions_take_text_and_tokens_and_stop_strings(self, engine: Running) -> None:
        body = {"model": engine.base, "prompt": "the cat", "max_tokens": 24, "temperature": 0}
        with engine.client() as client:
            text = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
            stop = text[len(text) // 2 : len(text) // 2 + 3]
            stopped = client.post("/v1/completions", json=body | {"stop": [stop]}).raise_for_status().json()
        assert stopped["choices"][0]["text"] == text[: text.index(stop)]
        assert stopped["choices"][0]["finish_reason"] == "stop"

    def test_seeds_make_answers_repeatable(self, engine: Running) -> None:
        body = CHAT | {"model": engine.base, "max_tokens": 20, "temperature": 1.0, "n": 2}
        with engine.client() as client:
            said = [
                [
                    choice["message"]["content"]
                    for choice in client.post("/v1/chat/completions", json=ask).json()["choices"]
                ]
                for ask in (body | {"seed": 3}, body | {"seed": 3}, body | {"seed": 4})
            ]
        assert said[0] == said[1] != said[2]
        assert said[0][0] != said[0][1]

    def test_a_priority_changes_when_an_answer_comes_and_not_what_it_says(self, engine: Running) -> None:
        body = CHAT | {"model": engine.base}
        with engine.client() as client:
            said = [
                client.post("/v1/chat/completions", json=body | more).raise_for_status().json()["choices"]
                for more in ({}, {"priority": 0}, {"priority": 1})
            ]
            assert client.post("/v1/chat/completions", json=body | {"priority": "soon"}).status_code == 400
        assert said[0] == said[1] == said[2]

    def test_an_answer_that_nobody_reads_makes_room(self, engine: Running) -> None:
        """More than can decode at once, all left after their first piece: the next is answered all the same."""
        body = CHAT | {"model": engine.base, "max_tokens": 400, "stream": True}
        with engine.client() as client:
            for _ in range(3 * ROWS):
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    next(response.iter_lines())
            assert client.post("/v1/chat/completions", json=CHAT | {"model": engine.base}).status_code == 200

    def test_logprobs_stand_beside_their_tokens(self, engine: Running) -> None:
        body = CHAT | {"model": engine.base, "logprobs": True, "top_logprobs": 2}
        with engine.client() as client:
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == answer["usage"]["completion_tokens"]
        for token in content:
            assert token["logprob"] <= 0
            assert token["logprob"] == pytest.approx(max(top["logprob"] for top in token["top_logprobs"]), abs=1e-4)

    def test_adapters_come_and_go_under_their_names(self, engine: Running) -> None:
        with engine.client() as client:
            ask = CHAT | {"model": "cats-v1"}
            assert client.post("/v1/chat/completions", json=ask).status_code == 404
            assert engine.load("cats-v1").status_code == 200
            cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
            assert cards["cats-v1"]["parent"] == engine.base
            tuned = client.post("/v1/chat/completions", json=ask).raise_for_status().json()
            plain = client.post("/v1/chat/completions", json=CHAT | {"model": engine.base}).json()
            assert tuned["choices"][0]["message"] != plain["choices"][0]["message"]
            assert client.post("/v1/unload_lora_adapter", json={"lora_name": "cats-v1"}).status_code == 200
            assert client.post("/v1/chat/completions", json=ask).status_code == 404
            assert client.post("/v1/unload_lora_adapter", json={"lora_name": "cats-v1"}).status_code == 404

    def test_a_name_never_changes_its_meaning(self, engine: Running) -> None:
        assert engine.load("cats-v2").status_code == 200
        assert engine.load("cats-v2", "cats-v3").status_code in (400, 409)

    def test_wrong_requests_are_refused_in_openai_shape(self, engine: Running) -> None:
        wrong: list[tuple[int, dict[str, Any]]] = [
            (404, CHAT | {"model": "nobody"}),
            (400, {"model": engine.base}),
            (400, CHAT | {"model": engine.base, "max_tokens": -1}),
            (400, CHAT | {"model": engine.base, "temperature": "warm"}),
            (400, CHAT | {"model": engine.base, "messages": [{"role": "user", "content": "the cat " * 20_000}]}),
            (400, CHAT | {"model": engine.base, "max_tokens": 10_000_000}),
        ]
        with engine.client() as client:
            for status, body in wrong:
                response = client.post("/v1/chat/completions", json=body)
                assert response.status_code == status, (body, response.text)
                assert response.json()["error"]["message"]

    def test_metrics_are_prometheus(self, engine: Running) -> None:
        with engine.client() as client:
            response = client.get("/metrics")
        assert response.status_code == 200
        assert "# TYPE" in response.text


@pytest.mark.skipif("ENGINE_URL" not in os.environ, reason="names no engine to hold against the contract")
class TestTheEngineAtAnAddress(EngineContract):
    """Such as vLLM with ``--enable-lora``, ``--scheduling-policy priority`` and
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``: ``ENGINE_URL`` and ``ENGINE_SECRET``, ``ENGINE_BASE`` as it is called there,
    its folder in ``ENGINE_BASE_FOLDER``, and in ``ENGINE_ADAPTERS`` one where adapters for it are made, which the
    engine can read."""

    @pytest.fixture(scope="class")
    def engine(self) -> Running:
        from deploy.decoding import open_model

        root = Path(os.environ["ENGINE_ADAPTERS"])
        model, _ = open_model(Path(os.environ["ENGINE_BASE_FOLDER"]))
        return Running(
            url=os.environ["ENGINE_URL"],
            base=os.environ["ENGINE_BASE"],
            adapters={f"cats-v{i}": save_adapter(model, root / f"cats-v{i}", seed=i, r=8 * i) for i in (1, 2, 3)},
            secret=os.environ["ENGINE_SECRET"],
        )


class TestOurEngine(EngineContract):
    def test_a_prompt_that_is_too_long_is_told_by_its_code(self, engine: Running) -> None:
        long = {"messages": [{"role": "user", "content": "the cat " * 20_000}], "model": engine.base}
        with engine.client() as client:
            error = client.post("/v1/chat/completions", json=CHAT | long).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

    def test_the_official_client_is_content(self, engine: Running) -> None:
        import openai

        engine.load("cats-v2")
        http = httpx.Client(trust_env=False)
        with openai.OpenAI(base_url=f"{engine.url}/v1", api_key=SECRET, http_client=http) as client:
            assert "cats-v2" in [model.id for model in client.models.list()]
            messages: Any = [{"role": "user", "content": [{"type": "text", "text": "the rat"}]}]
            whole = client.chat.completions.create(
                model="cats-v2", messages=messages, max_completion_tokens=20, temperature=0.7, seed=3, n=2
            )
            assert [choice.index for choice in whole.choices] == [0, 1]
            assert whole.usage is not None
            stream = client.chat.completions.create(
                model="cats-v2", messages=messages, max_completion_tokens=20, temperature=0.7, seed=3, n=2, stream=True
            )
            texts = ["", ""]
            for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            assert texts == [choice.message.content for choice in whole.choices], "seeds make answers repeatable"
            text = client.completions.create(model="base", prompt=["the", "a cat"], max_tokens=5, logprobs=2)
            assert len(text.choices) == 2
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="nobody", messages=messages)
            with pytest.raises(openai.BadRequestError, match="tools"):
                client.chat.completions.create(
                    model="base", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
                )
            look = [{"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}]
            with pytest.raises(openai.BadRequestError, match="text only, and no part of type 'image_url'"):
                client.chat.completions.create(model="base", messages=[{"role": "user", "content": look}])

    def test_one_of_many_adapters_at_once_answers_as_alone(self, engine: Running) -> None:
        import asyncio

        names = ["base", "cats-v1", "cats-v2", "cats-v3"]
        for name in names[1:]:
            assert engine.load(name).status_code == 200
        bodies = [CHAT | {"model": names[i % 4], "max_tokens": 8 + 5 * (i % 3)} for i in range(16)]
        with engine.client() as client:
            alone = [client.post("/v1/chat/completions", json=body).raise_for_status().json() for body in bodies]

        async def together() -> list[dict[str, Any]]:
            headers = {"authorization": f"Bearer {SECRET}"}
            async with httpx.AsyncClient(base_url=engine.url, headers=headers, trust_env=False, timeout=60) as client:
                got = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
            return [response.raise_for_status().json() for response in got]

        mixed = asyncio.run(together())
        assert [answer["choices"] for answer in mixed] == [answer["choices"] for answer in alone]
        for answer in mixed:
            ours = answer["tunesmith"]
            assert 0 < ours["engine_seconds"] < 60
            assert 0 <= ours["queue_ms"] <= ours["ttft_ms"]
            assert ours["mean_logprob"] < 0

    def test_loading_again_is_harmless_and_bad_adapters_leave_the_old_ones(
        self, engine: Running, tmp_path: Path
    ) -> None:
        assert engine.load("cats-v2").status_code == 200
        assert engine.load("cats-v2").status_code == 200
        bad = tmp_path / "bad"
        shutil.copytree(engine.adapters["cats-v1"], bad)
        weights = bad / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with engine.client() as client:
            for body in (
                {"lora_name": "cats-v9", "lora_path": str(bad)},
                {"lora_name": "cats-v9", "lora_path": str(tmp_path / "nothing")},
                {"lora_name": "../cats", "lora_path": str(engine.adapters["cats-v1"])},
                {"lora_name": "base", "lora_path": str(engine.adapters["cats-v1"])},
                {"lora_name": "cats-v9"},
                {
                    "lora_name": "cats-v9", "lora_path": str(engine.adapters["cats-v1"]),
                    "digests": {"adapter_model.safetensors": file_digest(engine.adapters["cats-v2"] / weights.name)},
                },
            ):  # fmt: skip
                response = client.post("/v1/load_lora_adapter", json=body)
                assert response.status_code == 400, response.text
                assert response.json()["error"]["type"] == "invalid_request_error"
            client.post("/v1/chat/completions", json=CHAT | {"model": "cats-v2"}).raise_for_status()

    def test_an_adapter_is_loaded_as_it_was_sealed(self, engine: Running) -> None:
        folder = engine.adapters["cats-v1"]
        digests = {name: file_digest(folder / name) for name in ("adapter_model.safetensors", "adapter_config.json")}
        with engine.client() as client:
            body = {"lora_name": "sealed-v1", "lora_path": str(folder), "digests": digests}
            client.post("/v1/load_lora_adapter", json=body).raise_for_status()
            client.post("/v1/unload_lora_adapter", json={"lora_name": "sealed-v1"}).raise_for_status()

    def test_a_client_that_leaves_frees_its_place(self, engine: Running) -> None:
        long = CHAT | {"model": "base", "max_tokens": 400, "ignore_eos": True}

        def figures(client: httpx.Client) -> dict[str, float]:
            lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
            return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

        cancelled = 'tunesmith_engine_requests_total{finish="cancelled"}'
        with engine.client() as client:
            before = figures(client).get(cancelled, 0)
            with (
                engine.client() as leaving,
                leaving.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as r,
            ):
                next(r.iter_lines())
            with engine.client() as impatient, pytest.raises(httpx.ReadTimeout):
                impatient.post("/v1/chat/completions", json=long, timeout=httpx.Timeout(30, read=0.1))
            for _ in range(600):
                now = figures(client)
                if now.get(cancelled, 0) == before + 2:
                    break
                time.sleep(0.05)
            assert now[cancelled] == before + 2
            assert now["tunesmith_engine_running"] == now["tunesmith_engine_waiting"] == 0

    def test_hostile_requests_are_refused(self, engine: Running) -> None:
        with engine.client() as client:
            for body, status in (
                (b"{", 400),
                (b"[]", 400),
                (b'"' + b"x" * (5 << 20) + b'"', 413),
                (json.dumps(CHAT | {"model": "base", "n": 10**6}).encode(), 400),
                (json.dumps({"model": "base", "prompt": [99999]}).encode(), 400),
                (json.dumps({"model": "x" * 10_000, **CHAT}).encode(), 400),
            ):
                path = "/v1/completions" if b"prompt" in body else "/v1/chat/completions"
                assert client.post(path, content=body).status_code == status
            assert client.get("/v1/nothing").status_code == 404


def test_the_queue_has_a_bound(folders: dict[str, Path]) -> None:
    import asyncio

    from deploy.engine import Engine, Limits
    from deploy.engine_routes import create_app

    engine = Engine(folders["base"], Limits(rows=1, queue=2))
    engine.start()
    try:
        app = create_app(engine, SECRET)

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=app)
            headers = {"authorization": f"Bearer {SECRET}"}
            body = {"model": "base", "prompt": "the", "max_tokens": 100, "ignore_eos": True}
            async with httpx.AsyncClient(transport=transport, base_url="http://engine", headers=headers) as client:
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(6)))

        answers = asyncio.run(ask())
        served = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(served) + len(refused) == 6
        assert 1 <= len(refused) <= 4
        assert all(answer.headers["retry-after"] for answer in refused)
        assert all(answer.json()["error"]["code"] == "engine_full" for answer in refused)
    finally:
        engine.stop()


def test_background_requests_have_a_bound_of_their_own(folders: dict[str, Path]) -> None:
    """The one place is taken and the queue of background requests full: as many others as ever may wait, and they are
    answered first."""
    import asyncio

    from deploy.engine import Engine, Limits
    from deploy.engine_routes import create_app

    engine = Engine(folders["base"], Limits(rows=1, queue=8))
    engine.start()
    body = {"model": "base", "prompt": "the", "max_tokens": 30, "ignore_eos": True, "temperature": 1, "seed": 1}
    done: list[int] = []

    async def ask() -> tuple[list[httpx.Response], list[httpx.Response], httpx.Response]:
        go = threading.Event()
        headers = {"authorization": f"Bearer {SECRET}"}
        transport = httpx.ASGITransport(app=create_app(engine, SECRET))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", headers=headers) as client:

            async def post(priority: int) -> httpx.Response:
                answer = await client.post("/v1/completions", json=body | {"priority": priority})
                if answer.status_code == 200:
                    done.append(priority)
                return answer

            alone = await post(0)
            done.clear()
            waiting = asyncio.create_task(engine.scheduler.call(lambda: go.wait(60)))
            try:
                copies = [asyncio.create_task(post(1)) for _ in range(5)]
                while sum(copy.done() for copy in copies) < 3:
                    await asyncio.sleep(0.01)
                assert engine.scheduler.background == 2
                others = [asyncio.create_task(post(0)) for _ in range(9)]
                while not any(other.done() for other in others):
                    await asyncio.sleep(0.01)
                assert engine.scheduler.waiting == 8
            finally:
                go.set()
            assert await waiting
            return await asyncio.gather(*copies), await asyncio.gather(*others), alone

    try:
        copies, others, alone = asyncio.run(ask())
    finally:
        engine.stop()
    assert sorted(answer.status_code for answer in copies) == [200] * 2 + [429] * 3
    assert sorted(answer.status_code for answer in others) == [200] * 8 + [429]
    assert done == [0] * 8 + [1] * 2
    for answer in (*copies, *others):
        if answer.status_code == 200:
            assert answer.json()["choices"] == alone.json()["choices"]


def test_a_request_that_breaks_the_model_breaks_no_other(folders: dict[str, Path]) -> None:
    import asyncio

    import torch

    from deploy.engine import Engine, Limits
    from deploy.engine_routes import create_app

    engine = Engine(folders["base"], Limits(rows=4))
    poison = engine.tokenizer("~").input_ids
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[poison] = float("nan")
    engine.model.lm_head.weight = torch.nn.Parameter(engine.model.lm_head.weight.nan_to_num(0.0))
    engine.start()
    try:
        app = create_app(engine, SECRET)

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=app)
            headers = {"authorization": f"Bearer {SECRET}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://engine", headers=headers) as client:
                # Without chance: a row that happened to draw the poisoned token would break too, and rightly so
                settings = {"model": "base", "max_tokens": 20, "temperature": 0}
                bodies = [settings | {"prompt": prompt} for prompt in ("the", "a ~ b", "cat")]
                return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

        answers = asyncio.run(ask())
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert answers[1].json()["error"]["type"] == "server_error"

        engine.scheduler._batch.step = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        assert {answer.status_code for answer in asyncio.run(ask())} <= {200, 500}
        assert [answer.status_code for answer in asyncio.run(ask())] == [200, 500, 200], "a new batch goes on"
    finally:
        engine.stop()


def test_its_row_stands_while_it_runs(database: Any) -> None:
    from deploy.engine import Registration
    from infra.db import transaction

    digest = "sha256:" + "0" * 64

    with transaction() as conn:
        conn.execute(
            "insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)"
            " values (%(digest)s, 'test', 'main', %(digest)s, %(digest)s, 1, 'float32')",
            {"digest": digest},
        )
    killed = Registration(digest, "http://127.0.0.1:1")
    killed.beat()
    again = Registration(digest, "http://127.0.0.1:1")
    again.beat()
    again.beat()
    with transaction() as conn:
        rows = conn.execute("select * from engine").fetchall()
    assert [row["url"] for row in rows] == ["http://127.0.0.1:1"], "one killed at the same address is forgotten"
    again.remove()
    with transaction() as conn:
        assert conn.execute("select count(*) as n from engine").fetchone() == {"n": 0}


def test_what_cannot_start_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    import socket

    def said(*args: str, **env: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "engine", *args],
            env={**os.environ, "TUNESMITH_HOME": str(tmp_path), **env},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        return result.stderr

    secret = {"TUNESMITH_ENGINE_SECRET": SECRET}
    assert "secret" in said("--base", str(folders["base"]))
    assert "is not" in said("--base", str(tmp_path / "nothing"), **secret)
    (tmp_path / "empty").mkdir()
    assert "causal language model" in said("--base", str(tmp_path / "empty"), **secret)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in said("--base", str(folders["base"]), "--port", port, **secret)
