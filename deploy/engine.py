"""The engine: one base and many adapters behind vLLM's HTTP contract, in one process.

The event loop checks, queues and streams; the model's thread (`Scheduler`) decodes. Names of adapters never change
their meaning, and the base alone answers under the name ``base``.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psycopg

from deploy import chat, decoding
from deploy.adapters import Adapters
from deploy.sampling import Sampling
from deploy.scheduler import Scheduler, Ticket
from infra.db import load_queries, transaction
from infra.errors import NoModel, TunesmithError, UsageError
from infra.settings import get_settings

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)
T = TypeVar("T")

BASE_NAME = "base"
COMPLETION_TOKENS = 16  # OpenAI's default for text completions; chats may fill the context


class Broken(TunesmithError):
    """The model failed in the middle of an answer."""

    code: ClassVar[str] = "engine_failed"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`rows` decode at once, `queue` wait; `context` tokens a request at most, prompt and answer together;
    `cache_bytes` for keys and values, and a quarter more for background requests that are set aside (or one's)."""

    rows: int = 16
    queue: int = 256
    context: int = 4096
    cache_bytes: int = 1 << 30
    body_bytes: int = 4 << 20
    adapter_rank: int = 256
    adapters: int = 64


class Engine:
    """One base in memory, its adapters, and the thread that decodes. `start` it, `stop` it."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        """Load the base from its folder. Raises UsageError when it is none that can be served."""
        self.folder = folder
        self.limits = limits or Limits()
        self.model, self.tokenizer = decoding.open_model(folder)
        config = self.model.config.get_text_config()
        self.context = min(self.limits.context, int(getattr(config, "max_position_embeddings", self.limits.context)))
        self.adapters = Adapters(self.model, max_rank=self.limits.adapter_rank, max_adapters=self.limits.adapters)
        self.scheduler = Scheduler(
            self.model,
            copy.deepcopy(self.tokenizer),  # fast tokenisers must not be shared with another thread's encoding
            self.adapters,
            max_rows=self.limits.rows,
            max_cells=max(self.context, self.limits.cache_bytes // _bytes_per_token(self.model)),
            queue=self.limits.queue,
        )
        self.created = int(time.time())
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._longest = max(map(len, self.tokenizer.get_vocab()))  # characters of a token

    def start(self) -> None:
        """Decode once, so that the first request finds everything warm, and start the thread."""
        warm = decoding.Request(prompt=[0, 1], sampling=Sampling(max_tokens=2, ignore_eos=True))
        decoding.generate(self.model, self.tokenizer, self.adapters, [warm])
        self.scheduler.start()

    def stop(self) -> None:
        self.scheduler.stop()
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def names(self) -> list[str]:
        """What can be asked: the base and the adapters."""
        return [BASE_NAME, *self.adapters.names()]

    async def submit(self, ask: chat.ChatAsk | chat.CompletionAsk) -> Ticket:
        """Encode and queue. Raises NoModel, BadRequest, Full."""
        if ask.model not in self.names():
            raise NoModel(f"The model {ask.model[:100]!r} does not exist.", hint="Load it, or see /v1/models.")
        # A refusal must not cost an encoding
        self.scheduler.check_room(ask.n, background=ask.priority > 0)
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._encoder, self._encode, ask)
        default = COMPLETION_TOKENS if isinstance(ask, chat.CompletionAsk) else None
        return self.scheduler.submit(
            [
                decoding.Request(
                    prompt=prompt,
                    adapter=None if ask.model == BASE_NAME else ask.model,
                    sampling=ask.sampling(self.context - len(prompt), default, choice),
                    priority=ask.priority,
                )
                for prompt in prompts
                for choice in range(ask.n)
            ],
            loop,
        )

    async def spelled(self, make: Callable[[], T]) -> T:
        """What `make` gives, by the one thread that may use the tokenizer: log-probabilities are of many tokens."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, make)

    def _encode(self, ask: chat.ChatAsk | chat.CompletionAsk) -> list[list[int]]:
        chats = isinstance(ask, chat.ChatAsk)
        texts = ["".join(m.content for m in ask.messages)] if isinstance(ask, chat.ChatAsk) else ask.prompt
        for text in texts:  # before it takes its time
            if isinstance(text, str) and len(text) > self.context * self._longest:
                raise chat.TooLong(
                    f"The prompt has {len(text):,} characters, which is more than this engine's context of "
                    f"{self.context} tokens, answer included, can hold.",
                    hint="Shorten the prompt.",
                    details={"param": "messages" if chats else "prompt"},
                )
        if isinstance(ask, chat.ChatAsk):
            from registry import prompts

            messages = [{"role": message.role, "content": message.content} for message in ask.messages]
            try:
                found = [prompts.encode(self.tokenizer, messages)]
            except ValueError as error:
                raise chat.BadRequest(f"{error}.", details={"param": "messages"}) from error
        else:
            found = [
                list(prompt) if not isinstance(prompt, str) else self.tokenizer(prompt).input_ids
                for prompt in ask.prompt
            ]
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for prompt in found:
            if not prompt:
                raise chat.BadRequest("The prompt is empty.", details={"param": "prompt"})
            if len(prompt) >= self.context:
                raise chat.TooLong(
                    f"The prompt is {len(prompt)} tokens; this engine's context is {self.context}, answer included.",
                    hint="Shorten the prompt.",
                    details={"param": "messages" if chats else "prompt"},
                )
            if max(prompt) >= vocabulary:
                raise chat.BadRequest(f"The prompt holds token {max(prompt)}, beyond the base's {vocabulary}.")
        return found


def _bytes_per_token(model: Any) -> int:
    """Of keys and values, over all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


class Registration:
    """This engine's row in the database, kept fresh; a database that is away is waited for."""

    def __init__(self, base_digest: str, url: str) -> None:
        self._row = {"id": uuid.uuid4(), "base_digest": base_digest, "url": url}
        self._known = self._silent = False

    def beat(self) -> None:
        try:
            with transaction() as conn:
                if not self._known:
                    conn.execute(SQL["forget_address"], self._row)  # of one that was killed here
                conn.execute(SQL["register"], self._row)
            self._known, self._silent = True, False
        except (TunesmithError, psycopg.Error) as error:
            if not self._silent:
                log.warning("the engine's row cannot be written, trying on: %s", error)
            self._silent = True

    def remove(self) -> None:
        with suppress(TunesmithError, psycopg.Error), transaction() as conn:
            conn.execute(SQL["remove"], self._row)


def run(base: str, *, host: str, port: int, url: str | None = None, limits: Limits | None = None) -> None:
    """Serve a base until interrupted. `base`: a digest, or whatever ``registry.bases.resolve`` takes; without a
    database, a folder. `port` 0: any free one. `url`: where others reach this engine, if not at host and port.

    Raises UsageError: the port is taken, no secret is set, or the base cannot be served.
    """
    import uvicorn

    from deploy.engine_routes import create_app

    settings = get_settings()
    if settings.engine_secret is None:
        raise UsageError("No engine secret is set.", hint="Set TUNESMITH_ENGINE_SECRET, the same for the gateway.")
    bound = _bind(host, port)
    address = url or f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    folder, digest = _find(base)
    _quiet()
    engine = Engine(folder, limits)
    engine.start()
    registration = Registration(digest, address) if digest is not None else None
    server: uvicorn.Server

    def beat() -> None:
        if not engine.scheduler.is_alive():  # before the database is asked, which may take its time
            log.error("the model's thread ended; the process ends too, to be started again")
            server.should_exit = True
        elif registration is not None:
            registration.beat()

    app = create_app(engine, settings.engine_secret.get_secret_value(), beat=beat)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http="httptools",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=75,  # longer than a gateway keeps a connection that it does not use
        )
    )
    log.info("base %s at %s: %d rows, context %d", digest or folder, address, engine.limits.rows, engine.context)
    gc.collect()
    gc.freeze()  # what was imported is not looked through by each full collection, while no token is decoded
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    except OSError as error:  # another process bound the port in the same moment, and listened first
        raise UsageError(f"Port {port} of {host} cannot be used: {error.strerror}.", hint="Choose another.") from error
    else:
        if not engine.scheduler.is_alive():
            raise Broken("The model's thread ended.", hint="See the log.")
    finally:
        engine.stop()
        if registration is not None:
            registration.remove()


def _bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port but does not listen yet: callers are refused until the base is loaded."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UsageError(f"Port {port} of {host} cannot be used: {error.strerror}.", hint="Choose another.") from error
    return bound


def _quiet() -> None:
    """No progress bars in the log."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _find(base: str) -> tuple[Path, str | None]:
    """The base's folder, and its digest where a database knows it."""
    if get_settings().database_url is None and not base.startswith("sha256:"):
        if not Path(base).is_dir():
            raise UsageError(f"Without a database the base is a folder, which {base!r} is not.")
        return Path(base), None
    from registry import bases

    found = bases.load(base) if base.startswith("sha256:") else bases.resolve(base)
    bases.check(found.digest)  # whatever changed its files, no version was judged on that
    return found.folder, found.digest
