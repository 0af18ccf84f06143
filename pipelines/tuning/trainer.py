"""One trial's training: a lean loop over tokenised rows, which can stop at any rung and go on exactly as if it
had not.

All that is random is a function of (seed, step): the order of rows, dropout. So a checkpoint is the adapter, the
optimizer's two moments and the step, and a resumed trial equals one that never stopped.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tuning.methods import Adapter

if TYPE_CHECKING:
    import torch

    from pipelines.data.tokenise import Tokens

_IGNORED = -100
_MEGABATCH = 16  # batches whose rows are sorted by length together: little padding, still random


class TrialFailed(Exception):
    """The trial's own fault: its loss left the numbers, or it does not fit into memory."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`value` is the validation loss in nats a completion token; `curve` has [step, training loss] pairs."""

    value: float
    curve: list[tuple[int, float]]
    tokens: int
    seconds: float


class Trainer:
    """Holds one base and its data for many trials, one at a time. Not thread-safe."""

    def __init__(self, model: Any, train: Tokens, validation: Tokens, *, pad: int) -> None:
        self.model, self.train, self.validation, self.pad = model, train, validation, pad
        self._direct = self._head_alone_is_equal()

    def run(
        self, params: Mapping[str, Any], *, seed: int, total_steps: int, until: int, checkpoint: Path | None,
        init_adapter: Path | None, save_to: Path, alive: Callable[[], None],
    ) -> Outcome:  # fmt: skip
        """Train a configuration from a checkpoint (None: from the start) until a step, save to a folder, validate.

        The learning rate follows its schedule over `total_steps`, wherever the rung ends. `alive` is called at each
        step and may raise to abandon the work. Raises TrialFailed.
        """
        import torch

        begun = time.monotonic()
        adapter = Adapter(self.model, params, seed=seed)
        try:
            if checkpoint is not None:
                adapter.load(checkpoint / "adapter")
            elif init_adapter is not None:
                adapter.load(init_adapter)
            optimizer = torch.optim.AdamW(
                list(adapter.parameters.values()), lr=1.0, weight_decay=float(params["weight_decay"])
            )
            first = _load_moments(checkpoint, adapter, optimizer) if checkpoint is not None else 0
            curve, tokens = self._steps(adapter, optimizer, params, seed, first, until, total_steps, alive)
            value = self._validate(alive)
            (save_to / "adapter").mkdir()
            adapter.save(save_to / "adapter")
            _save_moments(save_to, adapter, optimizer, until)
            return Outcome(value=value, curve=curve, tokens=tokens, seconds=time.monotonic() - begun)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise TrialFailed(f"out of memory with {dict(params)}") from error
            raise
        finally:
            adapter.remove()

    def _steps(
        self, adapter: Adapter, optimizer: Any, params: Mapping[str, Any], seed: int, first: int, until: int,
        total: int, alive: Callable[[], None],
    ) -> tuple[list[tuple[int, float]], int]:  # fmt: skip
        import torch

        curve: list[tuple[int, float]] = []
        size, tokens = min(int(params["per_device_train_batch_size"]), len(self.train)), 0
        lengths = [len(self.train.row(i)) for i in range(len(self.train))]
        self.model.train()
        epoch = -1
        batches: list[list[int]] = []
        for step in range(first, until):
            alive()
            if step // (len(lengths) // size) != epoch:
                epoch = step // (len(lengths) // size)
                batches = epoch_of(lengths, size, seed=seed, epoch=epoch)
            rows = batches[step % len(batches)]
            torch.manual_seed(_mix(seed, step))  # dropout's masks
            ids, mask, labels = self._batch(self.train, rows)
            loss = self._loss(ids, mask, labels).mean()
            if not math.isfinite(loss.item()):
                raise TrialFailed(
                    f"the loss became {loss.item()} at step {step + 1} with learning_rate {params['learning_rate']:g}"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(adapter.parameters.values(), float(params["max_grad_norm"]))
            if not math.isfinite(norm.item()):
                raise TrialFailed(f"the gradient became {norm.item()} at step {step + 1}")
            rate = learning_rate(params, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.append((step + 1, loss.item()))
            tokens += int(mask.sum())
        return curve, tokens

    def _validate(self, alive: Callable[[], None]) -> float:
        """Mean negative log-likelihood of a completion token, over all validation rows."""
        import torch

        self.model.eval()
        order = sorted(range(len(self.validation)), key=lambda i: len(self.validation.row(i)))
        total, count = 0.0, 0
        with torch.inference_mode():
            for start in range(0, len(order), 16):
                alive()
                losses = self._loss(*self._batch(self.validation, order[start : start + 16]))
                total, count = total + float(losses.double().sum()), count + losses.numel()
        value = total / count
        if not math.isfinite(value):
            raise TrialFailed(f"the validation loss is {value}")
        return value

    def _batch(self, tokens: Tokens, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Right-padded ids, mask and labels of rows; labels hold the completion's tokens, shifted to where they are
        predicted."""
        import torch

        longest = max(len(tokens.row(i)) for i in rows)
        ids = torch.full((len(rows), longest), self.pad, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        labels = torch.full((len(rows), longest), _IGNORED, dtype=torch.long)
        for n, i in enumerate(rows):
            row = torch.from_numpy(tokens.row(i).astype("int64"))
            prompt = int(tokens.prompt_lengths[i])
            ids[n, : len(row)] = row
            mask[n, : len(row)] = 1
            labels[n, prompt - 1 : len(row) - 1] = row[prompt:]
        return ids, mask, labels

    def _loss(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of each completion token, in a flat fp32 tensor."""
        import torch

        chosen = labels != _IGNORED
        if self._direct:
            hidden = self.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[chosen])
        else:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[chosen]
        return torch.nn.functional.cross_entropy(logits.float(), labels[chosen], reduction="none")

    def _head_alone_is_equal(self) -> bool:
        """Whether decoder and head by themselves give this model's logits. True for most; some scale or cap them,
        and are then run whole."""
        import torch

        ids, mask, labels = self._batch(self.train, [0])
        with torch.inference_mode():
            self.model.eval()
            whole = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            hidden = self.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            alone = self.model.get_output_embeddings()(hidden)
        return bool(torch.allclose(whole.float(), alone.float(), atol=1e-3, rtol=1e-3)) and labels.numel() > 0


def learning_rate(params: Mapping[str, Any], step: int, total: int) -> float:
    """The rate of a step (from 0): linear warm-up over ``warmup_ratio`` of all steps, then as
    ``lr_scheduler_type`` says, as transformers' schedulers do."""
    peak, warm = float(params["learning_rate"]), math.ceil(float(params["warmup_ratio"]) * total)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)
    if params["lr_scheduler_type"] == "linear":
        return peak * (1 - done)
    if params["lr_scheduler_type"] == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak


def epoch_of(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as row numbers: a seeded shuffle, rows of similar length together. A function of its
    arguments alone; rows that fill no batch wait for another epoch."""
    count = len(lengths) // size * size
    draw = random.Random(_mix(seed, epoch, 1))
    order = list(range(len(lengths)))
    draw.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, count, size * _MEGABATCH):
        mega = sorted(order[start : min(start + size * _MEGABATCH, count)], key=lengths.__getitem__)
        batches += [mega[at : at + size] for at in range(0, len(mega), size)]
    draw.shuffle(batches)
    return batches


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")


def _save_moments(folder: Path, adapter: Adapter, optimizer: Any, step: int) -> None:
    from safetensors.torch import save_file

    state = {}
    for name, parameter in adapter.parameters.items():
        moments = optimizer.state[parameter]
        state[f"first.{name}"] = moments["exp_avg"].contiguous()
        state[f"second.{name}"] = moments["exp_avg_sq"].contiguous()
    save_file(state, folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps({"step": step}))


def _load_moments(folder: Path, adapter: Adapter, optimizer: Any) -> int:
    import torch
    from safetensors.torch import load_file

    state = load_file(folder / "optimizer.safetensors")
    step = int(json.loads((folder / "progress.json").read_text())["step"])
    for name, parameter in adapter.parameters.items():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"first.{name}"],
            "exp_avg_sq": state[f"second.{name}"],
        }
    return step
