"""One base in memory, the adapters of several versions beside it, and the same rows put to all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.adapters import Adapters
from deploy.decoding import Batch, Request, Result, generate, open_model
from deploy.sampling import Sampling
from registry import prompts
from registry.bases import Base
from registry.datasets import Row

_BATCH_TOKENS = 4_096
_BATCH_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row in tokens: its prompt, as it is served, and the completion after it, as it is trained on."""

    row: Row
    whole: tuple[int, ...]
    prompt_length: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.whole[: self.prompt_length]

    @property
    def completion_length(self) -> int:
        return len(self.whole) - self.prompt_length


class Bench:
    """Versions side by side. A version is a name, and an adapter's folder or None for the base alone."""

    def __init__(self, base: Base, versions: Mapping[str, Path | None]) -> None:
        self.model, self.tokenizer = open_model(base.folder)
        # The last columns of many rows are no contiguous block, and torch would copy the head's weight for each row
        self.model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        self.adapters = Adapters(self.model)
        self.versions = dict(versions)
        for name, folder in versions.items():
            if folder is not None:
                self.adapters.load(name, folder)

    def cases(self, rows: Sequence[Row], *, system: str | None, max_tokens: int) -> list[Case]:
        """The rows in tokens, in their order, without those that do not fit the base's context."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        found = []
        for row in rows:
            whole, prompt_length = prompts.encode_pair(self.tokenizer, row.messages, system=system)
            if prompt_length + max_tokens <= most and len(whole) <= most:
                found.append(Case(row=row, whole=tuple(whole), prompt_length=prompt_length))
        return found

    def losses(self, cases: Sequence[Case], progress: Callable[[int], None] | None = None) -> dict[str, list[float]]:
        """For each version the mean negative log-likelihood (nats a token) of each row's completion, end token
        included, given its prompt."""
        found: dict[str, list[float]] = {name: [0.0] * len(cases) for name in self.versions}
        done = 0
        for batch in _batches(cases):
            for name in self.versions:
                for number, loss in zip(batch, self._losses(name, [cases[n] for n in batch]), strict=True):
                    found[name][number] = loss
            done += len(batch)
            if progress:
                progress(done)
        return found

    def _losses(self, version: str, cases: Sequence[Case]) -> list[float]:
        """Padded on the left, so that the completions stand together at the right end and the head works there
        only: logits are the costly part of a short row."""
        import torch

        width = max(len(case.whole) for case in cases)
        kept = max(case.completion_length for case in cases)
        ids = torch.zeros((len(cases), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        wanted = torch.zeros((len(cases), kept), dtype=torch.bool)
        for i, case in enumerate(cases):
            ids[i, width - len(case.whole) :] = torch.tensor(case.whole)
            mask[i, width - len(case.whole) :] = 1
            wanted[i, kept - case.completion_length :] = True
        ids, mask, wanted = (t.to(self.model.device) for t in (ids, mask, wanted))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode(), self.adapters.rows([self.adapters.get(version)] * len(cases)):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=kept + 1,
            )
            logits = output.logits[:, -kept - 1 : -1].float()
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -kept:].flatten(), reduction="none")
            each = each.view(len(cases), kept) * wanted
            losses: list[float] = (each.sum(1) / wanted.sum(1)).tolist()
        return losses

    def answers(
        self,
        cases: Sequence[Case],
        *,
        max_tokens: Mapping[str, int],
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, list[Result]]:
        """For each version the answers, at most ``max_tokens[version]`` long; all versions in one batch. Greedy
        unless there is a `temperature`; then a case that comes twice is drawn twice, each time by a seed of its own."""
        order = sorted(range(len(cases)), key=lambda n: len(cases[n].prompt))
        asked = [(name, number) for number in order for name in self.versions]
        results = generate(
            self.model,
            self.tokenizer,
            self.adapters,
            [
                self._request(name, cases[number], max_tokens[name], temperature=temperature, seed=seed + number)
                for name, number in asked
            ],
            max_rows=_BATCH_ROWS,
            progress=progress,
        )
        found: dict[str, dict[int, Result]] = {name: {} for name in self.versions}
        for (name, number), result in zip(asked, results, strict=True):
            found[name][number] = result
        return {name: [found[name][n] for n in range(len(cases))] for name in self.versions}

    def alone(self, cases: Sequence[Case], *, max_tokens: int, seconds: float, least: int) -> dict[str, list[Result]]:
        """For each version the answers to requests that come one at a time, the versions by turns, so that what
        else the machine does falls on all of them; ends after `seconds`, but not before `least` rows."""
        found: dict[str, list[Result]] = {name: [] for name in self.versions}
        begun = time.monotonic()
        for number, case in enumerate(cases):
            if number >= least and time.monotonic() - begun > seconds:
                break
            for name in self.versions:
                found[name].append(self._alone(self._request(name, case, max_tokens)))
        return found

    def _alone(self, request: Request) -> Result:
        batch: Any = Batch(self.model, self.tokenizer, self.adapters, max_rows=1)
        row = batch.row(request)
        batch.join(row)
        while row.finish is None:
            batch.step()
        result: Result = row.result()
        return result

    def _request(
        self, version: str, case: Case, max_tokens: int, *, temperature: float = 0.0, seed: int | None = None
    ) -> Request:
        adapter = version if self.versions[version] is not None else None
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
        return Request(prompt=case.prompt, adapter=adapter, sampling=sampling)


def _contiguous(module: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])


def _batches(cases: Sequence[Case]) -> list[list[int]]:
    """Rows of like length together, by number; at most so many padded tokens, and so many rows."""
    batches: list[list[int]] = []
    for number in sorted(range(len(cases)), key=lambda n: len(cases[n].whole)):
        width = len(cases[number].whole)  # the longest so far
        if batches and len(batches[-1]) < _BATCH_ROWS and width * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
