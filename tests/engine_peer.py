"""An HTTP server that speaks the engine's contract without a model, for faults that a real one cannot be asked for.

It answers every request with words that begin with the adapter's name. The last message may ask for more:
``slow`` (50 words, 0.05 s each), ``flood`` (20 MB), ``garbage`` (not JSON), ``break`` (the connection ends in the
middle), ``early`` (it ends before the first word, every other time), ``full`` (429), ``fail`` (500), ``sick`` (an error
instead of a word), ``call`` (a tool call), ``queued`` (it says that the request waited for an hour). ``GET /stats``
tells what it saw. Run as a process: ``python engine_peer.py PORT``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

SECRET = "peer-secret"


class Peer:
    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.stats: dict[str, Any] = {"answered": 0, "cancelled": 0, "active": 0, "loads": 0, "early": 0, "bodies": []}

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("authorization") != f"Bearer {SECRET}":
            return web.json_response({"error": {"message": "no secret"}}, status=401)
        return await handler(request)

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not (Path(body["lora_path"]) / "adapter_model.safetensors").is_file():
            return web.json_response({"error": {"message": "no such adapter"}}, status=400)
        if body["lora_name"] in self.loaded:
            return web.json_response({"error": {"message": "has already been loaded"}}, status=400)
        self.loaded[body["lora_name"]] = body["lora_path"]
        self.stats["loads"] += 1
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        self.loaded.pop((await request.json())["lora_name"], None)
        return web.Response(text="Success")

    async def tell(self, request: web.Request) -> web.Response:
        return web.json_response(self.stats | {"loaded": sorted(self.loaded)})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        chat = request.path.endswith("/chat/completions")
        model = body["model"]
        if model != "base" and model not in self.loaded:
            return web.json_response({"error": {"message": f"The model {model} does not exist."}}, status=404)
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        self.stats["bodies"] = [*self.stats["bodies"][-50:], body]
        if asked == "garbage":
            return web.Response(text="<html>oops", content_type="text/html")
        if asked in ("full", "fail"):
            return web.json_response({"error": {"message": asked}}, status=429 if asked == "full" else 500)
        words = [model, *(f" word{i}" for i in range(49 if asked == "slow" else 2))]
        if asked == "flood":
            words += ["x" * 50_000] * 400
        pause = 0.05 if asked == "slow" else 0.0
        usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
        queued = 3_600_000.0 if asked == "queued" else 0.1
        extra = {"engine_seconds": 0.01, "queue_ms": queued, "ttft_ms": 2.0, "mean_logprob": -0.5}
        head = {"id": "x", "object": "chat.completion", "created": 1, "model": model}
        self.stats["active"] += 1
        call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        try:
            if asked == "call" and not body.get("stream"):
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
                choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
                return web.json_response(head | {"choices": [choice], "usage": usage})
            if not body.get("stream"):
                for _ in words:
                    await asyncio.sleep(pause)
                said = (
                    {"message": {"role": "assistant", "content": "".join(words)}} if chat else {"text": "".join(words)}
                )
                choices = [{"index": 0, "finish_reason": "stop", "logprobs": None, **said}]
                self.stats["answered"] += 1
                return web.json_response(head | {"choices": choices, "usage": usage, "tunesmith": extra})
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)

            async def send(value: dict[str, Any]) -> None:
                await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")

            if chat:  # as vLLM and ours begin, before there is a token
                opening = {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}
                await send(head | {"choices": [opening]})
            if asked == "early":
                self.stats["early"] += 1
                if self.stats["early"] % 2:
                    assert request.transport is not None
                    request.transport.close()
                    return response
            if asked == "call":
                first, second = '{"a"', ": 1}"
                parts = [{"index": 0, **call, "function": {"name": "add", "arguments": first}},
                         {"index": 0, "function": {"arguments": second}}]  # fmt: skip
                for part in parts:
                    await send(
                        head | {"choices": [{"index": 0, "finish_reason": None, "delta": {"tool_calls": [part]}}]}
                    )
                await send(head | {"choices": [{"index": 0, "finish_reason": "tool_calls", "delta": {}}]})
                words = []
            for i, word in enumerate(words):
                if asked == "sick":
                    await send({"error": {"message": "the model computed NaN"}})
                    return response
                if asked == "break" and i == 1:
                    assert request.transport is not None
                    request.transport.close()
                    return response
                piece = {"delta": {"content": word}} if chat else {"text": word}
                finish = "stop" if i == len(words) - 1 else None
                await send(head | {"choices": [{"index": 0, "finish_reason": finish, **piece}]})
                await asyncio.sleep(pause)
            if body.get("stream_options", {}).get("include_usage"):
                await send(head | {"choices": [], "usage": usage, "tunesmith": extra})
            await response.write(b"data: [DONE]\n\n")
            self.stats["answered"] += 1
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.stats["cancelled"] += 1
            raise
        finally:
            self.stats["active"] -= 1


def main() -> None:
    peer = Peer()
    app = web.Application(middlewares=[peer.guard])
    app.router.add_post("/v1/chat/completions", peer.answer)
    app.router.add_post("/v1/completions", peer.answer)
    app.router.add_post("/v1/load_lora_adapter", peer.load)
    app.router.add_post("/v1/unload_lora_adapter", peer.unload)
    app.router.add_get("/stats", peer.tell)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
