"""Continuous batching over one base and many adapters, in one thread.

Rows of different requests, and of different adapters, take one step together; a request joins between steps and
leaves when it is done. To join, its prompt runs, with those of others that join, but for what prompts of its adapter
begin with (`deploy/prefixes.py`), and its keys and values are put beside those of the others (`deploy/memory.py`),
padded on the left; to leave, the other rows are kept and columns that nobody uses any more are cut off. Answers are
those of the request alone: in fp32 exactly, in bf16 up to the rounding that padding itself causes.

A background request makes way: it joins by short passes, can be set aside with its keys and values at any time, and
goes on later as if nothing had been (`deploy/scheduler.py` says when).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploy.adapters import Adapter, Adapters
from deploy.joining import Cached, Joining, together
from deploy.packed import pack
from deploy.prefixes import Prefixes
from deploy.sampling import Sampling, Text, draw
from infra.errors import NotFound, TunesmithError, UsageError

if TYPE_CHECKING:
    import torch

Finish = Literal["stop", "length", "cancelled", "error"]
_PASS_TOKENS = 1024  # that prompts may have together, padded, to be run in one pass
_PART = 4  # background requests have a quarter of the rows and of their memory
_SHORT_TOKENS = 32  # of a background request's prompt in one pass: who comes meanwhile waits for its end


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt in tokens, the name of an adapter or None for the base alone, and how to sample; a lower `priority`
    goes first."""

    prompt: Sequence[int]
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0

    @property
    def background(self) -> bool:
        """Whether nobody waits for it: it makes way for all that is not."""
        return self.priority > 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """`tokens` and `logprobs` (natural logarithm, of the model's own distribution at temperature 1) include the
    end token. `engine_seconds`: this request's share of the busy time; `seconds`: from its joining to its end."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: Finish
    mean_logprob: float
    logprobs: tuple[float, ...]
    engine_seconds: float
    seconds: float


class Row:
    """One request on its way through a batch."""

    def __init__(self, request: Request, adapter: Adapter | None, tokenizer: Any) -> None:
        self.request, self.adapter = request, adapter
        self.text = Text(tokenizer, request.sampling.stop)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[list[tuple[int, float]]] = []
        self.finish: Finish | None = None
        self.engine_seconds = 0.0
        self.created_at = time.perf_counter()
        self.joined_at = self.first_at = self.ended_at = 0.0
        self.aside: Joining | None = None  # what it goes on from, of one that made way
        self.aside_seconds = 0.0
        self._generator: torch.Generator | None = None

    @property
    def length(self) -> int:
        """Tokens whose keys and values are kept."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def most(self) -> int:
        """The length at which it is over at the latest."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else math.nan

    def choose(self, logits: torch.Tensor) -> int:
        if self._generator is None:
            import torch

            self._generator = torch.Generator()
            seed = self.request.sampling.seed
            self._generator.seed() if seed is None else self._generator.manual_seed(seed % 2**63)
        return draw(logits.cpu(), self.request.sampling, self._generator)

    def accept(self, token: int, logprob: float, tops: list[tuple[int, float]], ends: frozenset[int]) -> None:
        """Take the next token, and find out whether it is the last."""
        now = time.perf_counter()
        self.first_at = self.first_at or now
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.request.sampling.top_logprobs:
            self.tops.append(tops)
        if token in ends and not self.request.sampling.ignore_eos:
            self.text.close()
            self.end("stop")
        elif self.text.push(token):
            self.end("stop")
        elif len(self.tokens) >= self.request.sampling.max_tokens:
            self.end("stop" if self.text.close() else "length")

    def end(self, finish: Finish) -> None:
        self.finish, self.ended_at = finish, time.perf_counter()

    def result(self) -> Result:
        assert self.finish is not None  # noqa: S101 - for the type checker
        return Result(
            text=self.text.value,
            tokens=tuple(self.tokens),
            finish_reason=self.finish,
            mean_logprob=self.mean_logprob,
            logprobs=tuple(self.logprobs),
            engine_seconds=self.engine_seconds,
            seconds=self.ended_at - self.joined_at,
        )


class Batch:
    """The rows that decode together. Belongs to one thread.

    `rows` at most `max_rows`; rows times the longest row's final length at most `max_cells`, which bounds the memory
    of keys and values. Background rows have a part of both, or one row, and so have those that are set aside.
    """

    def __init__(
        self, model: Any, tokenizer: Any, adapters: Adapters, *, max_rows: int = 16, max_cells: int = 65536
    ) -> None:
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.max_rows, self.max_cells = max_rows, max_cells
        self.rows: list[Row] = []
        self._ends = end_tokens(model, tokenizer)
        self._slides = getattr(model.config.get_text_config(), "sliding_window", None) is not None
        self._prefixes = Prefixes(max_cells // 16)
        self._background_prefixes = Prefixes(max_cells // 16 // _PART)  # apart, to push nothing out
        self._memory: Any = None  # keys and values, given with the first row
        self._mask: torch.Tensor | None = None  # [rows, width], 1 where a column is the row's own

    def row(self, request: Request) -> Row:
        """A row for a request. Raises NotFound for an unknown adapter, UsageError for what can never fit."""
        adapter = None
        if request.adapter is not None and (adapter := self.adapters.use(request.adapter)) is None:
            raise NotFound(f"The adapter {request.adapter!r} is not loaded.")
        row = Row(request, adapter, self.tokenizer)
        if not request.prompt:
            raise UsageError("The prompt is empty.")
        if row.most > self.max_cells:
            raise UsageError(f"The prompt and max_tokens are {row.most} tokens; {self.max_cells} fit here.")
        return row

    def fits(self, row: Row, beside: Sequence[Row] = ()) -> bool:
        """Whether the row can join now, together with those `beside` it; one alone always can."""
        rows = len(self.rows) + len(beside) + 1
        width = max([row.most, *(other.most for other in (*self.rows, *beside))])
        part = _PART if row.request.background else 1
        return rows == 1 or (rows <= self.max_rows // part and width * rows <= self.max_cells // part)

    def join(self, *rows: Row) -> None:
        """Run the rows' prompts, several in one pass, but for what prompts of their adapters begin with, and take their
        first tokens; those that this does not end are in the next steps."""
        waiting = [Joining.of(row, self._prefixes) for row in rows]
        # Of like length together, so that little is padded; a pass reads all of the base's weights, however short
        waiting.sort(key=lambda joining: joining.rest)
        while waiting:
            count = 1
            while count < len(waiting) and (count + 1) * waiting[count].rest <= _PASS_TOKENS:
                if self._slides and any(joining.known for joining in waiting[: count + 1]):
                    break  # a window is of columns, and what is known of a prompt would stand too far from its rest
                count += 1
            group, waiting = waiting[:count], waiting[count:]
            started = time.perf_counter()
            self._run(group)
            share = (time.perf_counter() - started) / len(group)
            for joining in group:
                joining.row.engine_seconds += share
                if joining.row.finish is None:
                    self._append(joining.row, joining.cache)

    def join_shortly(self, row: Row) -> bool:
        """One short pass of a background row's way into the batch: some of its prompt, or back as it was set aside.
        Returns whether it is there; else it is set aside, and wants another pass."""
        started = time.perf_counter()
        joining = row.aside or Joining.of(row, self._background_prefixes)
        row.aside_seconds += max(0.0, started - joining.since)
        row.aside = joining if joining.rest > _SHORT_TOKENS else None
        if row.aside is not None:
            self._read(joining)
        elif joining.rest:
            self._run([joining])
        if row.aside is None and row.finish is None:
            self._append(row, joining.cache)
        joining.since = time.perf_counter()
        row.engine_seconds += joining.since - started
        return row.aside is None

    def _read(self, joining: Joining) -> None:
        """The next tokens of a prompt, which predict nothing yet."""
        import torch

        now = joining.known + _SHORT_TOKENS
        tokens = torch.tensor([joining.row.request.prompt[joining.known : now]], device=self.model.device)
        with torch.inference_mode(), self.adapters.rows([joining.row.adapter]):
            self.model(
                input_ids=tokens,
                attention_mask=tokens.new_ones(1, now),
                position_ids=torch.arange(joining.known, now, device=tokens.device)[None],
                past_key_values=joining.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        joining.known, joining.rest = now, joining.rest - _SHORT_TOKENS

    def set_aside(self, rows: Sequence[Row]) -> None:
        """Take rows out with their keys and values; `join_shortly` brings them back."""
        import torch

        for row in rows:
            end = self._memory.layers[0].width
            columns = torch.arange(end - row.length, end, device=self.model.device)
            cache = Cached.of(self._memory, self.rows.index(row), columns)
            adapter = row.adapter.digest if row.adapter else ""
            row.aside = Joining(row=row, adapter=adapter, known=row.length, rest=0, cache=cache)
        self._keep([i for i, row in enumerate(self.rows) if row not in rows])

    def _run(self, group: Sequence[Joining]) -> None:
        """The prompts of a group in one pass."""
        device = self.model.device
        tokens, mask, positions, cache = together(group)
        self._forward([j.row for j in group], tokens.to(device), mask.to(device), positions.to(device), cache)
        for i, joining in enumerate(group):
            if len(group) > 1:
                joining.cache = Cached.of(cache, i, mask[i].nonzero()[:, 0].to(device))
            prefixes = self._background_prefixes if joining.row.request.background else self._prefixes
            prefixes.learn(joining.adapter, joining.row.request.prompt, joining.cache)

    def step(self) -> list[Row]:
        """One more token for every row; returns the rows that took it. Those that ended have left the batch."""
        import torch

        if not self.rows:
            return []
        started, rows = time.perf_counter(), list(self.rows)
        assert self._mask is not None  # noqa: S101 - for the type checker
        tokens = torch.tensor([[row.tokens[-1]] for row in rows], device=self.model.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], 1)
        positions = self._mask.cumsum(1)[:, -1:] - 1
        self._forward(rows, tokens, self._mask, positions, self._memory)
        self._keep([i for i, row in enumerate(rows) if row.finish is None])
        share = (time.perf_counter() - started) / len(rows)
        for row in rows:
            row.engine_seconds += share
        return rows

    def cancel(self, row: Row) -> None:
        """Take a row out, at once; its place is free."""
        row.end("cancelled")
        if row in self.rows:
            self._keep([i for i, other in enumerate(self.rows) if other is not row])

    def _forward(
        self, rows: list[Row], tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> None:
        import torch

        with torch.inference_mode(), self.adapters.rows([row.adapter for row in rows]):
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1].float()
            logprobs = torch.log_softmax(logits, -1)
            best, greedy = (found.tolist() for found in logprobs.max(-1))
            for i, row in enumerate(rows):
                if not math.isfinite(best[i]):  # one NaN or infinity among the logits is enough
                    row.text.close()
                    row.end("error")
                    continue
                token = greedy[i] if row.request.sampling.temperature == 0 else row.choose(logits[i])
                tops: list[tuple[int, float]] = []
                if row.request.sampling.top_logprobs:
                    top = logprobs[i].topk(min(row.request.sampling.top_logprobs, logprobs.shape[-1]))
                    tops = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                row.accept(token, float(logprobs[i, token]), tops, self._ends)

    def _append(self, row: Row, cache: Any) -> None:
        import torch
        from torch.nn.functional import pad

        from deploy.memory import Memory

        if self._memory is None:
            self._memory = Memory(self.max_cells, cache)
        self._memory.add(cache, max([row.most, *(other.most for other in self.rows)]))
        mask = torch.ones((1, row.length), dtype=torch.long, device=self.model.device)
        if not self.rows:
            self._mask = mask
        else:
            assert self._mask is not None  # noqa: S101 - for the type checker
            width = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([pad(part, (width - part.shape[1], 0)) for part in (self._mask, mask)])
        self.rows.append(row)

    def _keep(self, kept: list[int]) -> None:
        """Keep these rows and cut off the left columns that none of them uses."""
        if len(kept) == len(self.rows):
            return
        assert self._mask is not None  # noqa: S101 - for the type checker
        dead = int(self._mask.shape[1] - self._mask[kept].sum(1).max()) if kept else 0
        self._memory.keep(kept, dead)
        self._mask = self._mask[kept][:, dead:]
        self.rows = [self.rows[i] for i in kept]


def generate(
    model: Any,
    tokenizer: Any,
    adapters: Adapters,
    requests: Iterable[Request],
    *,
    max_rows: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Answer all requests, `max_rows` at a time, in this thread; results in the order of the requests.

    `adapters` is ``Adapters(model)``, with those the requests name loaded: ``adapters.load("candidate", folder)``.
    `progress` gets the number of finished requests after each. Raises NotFound for an adapter that is not loaded,
    UsageError for an empty prompt, TunesmithError when the model computes NaN.
    """
    batch = Batch(model, tokenizer, adapters, max_rows=max_rows)
    rows = [batch.row(request) for request in requests]
    waiting, done = deque(rows), 0
    while waiting or batch.rows:
        over = [row for row in batch.step() if row.finish is not None]
        joining: list[Row] = []
        while waiting and batch.fits(waiting[0], joining):
            joining.append(waiting.popleft())
        batch.join(*joining)
        over += [row for row in joining if row.finish is not None]
        for row in over:
            if row.finish == "error":
                raise TunesmithError(f"The model computed NaN or infinity with the adapter {row.request.adapter}.")
            done += 1
            if progress is not None:
                progress(done)
    return [row.result() for row in rows]


def open_model(folder: Path, dtype: str | None = None, *, packed: bool = True) -> tuple[Any, Any]:
    """The causal language model and the tokeniser of a base's folder, for decoding in this process, in one thread.

    `dtype` None is the one the weights are stored in, which maps the file instead of copying it. Its weights are
    `packed` for decoding where that helps, and may then not be trained on. Raises UsageError when the base cannot be
    decoded in batches here.
    """
    import torch
    from transformers import AutoConfig

    from registry import bases

    torch.set_num_threads(1)
    try:
        stored = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().dtype
        model = bases.load_model(folder, dtype or str(stored or torch.float32).removeprefix("torch."))
        tokenizer = bases.load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} is not a causal language model: {str(error).strip().splitlines()[0]}") from error
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UsageError(f"The base's layers are {', '.join(sorted(kinds))}; only attention is decoded here.")
    if packed:
        pack(model)
    return model, tokenizer


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those of the model's generation settings, and the tokeniser's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*found, tokenizer.eos_token_id] if token is not None)
