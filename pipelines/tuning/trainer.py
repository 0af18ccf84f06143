"""Training: a lean loop over tokenised rows that advances a pack of trials together, stops at any rung, and goes on
exactly as if it had not.

All that is random is a function of (seed, step): the order of rows, dropout. So a checkpoint is the adapter, the
optimizer's two moments and the step, and a resumed trial equals one that never stopped. The order of rows is the
study's, not the trial's: trials are compared on the same rows in the same order, and those that train together share
their batches' shape.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tuning import memory
from pipelines.tuning.forward import Forward
from pipelines.tuning.methods import Alone, Targets, packable
from pipelines.tuning.pack import Pack

if TYPE_CHECKING:
    from pipelines.data.tokenise import Tokens

log = logging.getLogger(__name__)
_MEGABATCH = 16  # batches whose rows are sorted by length together: little padding, still random
_FORWARD_TOKENS = 4096  # an adapter's tokens in one forward pass, padding included; larger batches are accumulated
_SCORED_TOKENS = 1024  # the same in validation on a processor: less padding, and layers' results stay in its cache
_MEASURED = 6  # layers, or a few more, that are measured with
_TIMED = 0.1  # seconds, that a measurement lasts at least: clocks of a process may tick in hundredths
_MANY = 8  # adapters, of which half as many are measured too
_WORTH = 1.05  # a larger pack must bring this much more, since it delays what it could tell


class TrialFailed(Exception):
    """The trial's own fault: its loss left the numbers, or it does not fit into this machine's memory (`too_large`).
    It cost `tokens` and `seconds` all the same."""

    def __init__(self, why: str, *, tokens: int = 0, seconds: float = 0.0, too_large: bool = False) -> None:
        super().__init__(why)
        self.tokens, self.seconds, self.too_large = tokens, seconds, too_large


class PackTooLarge(Exception):
    """The members do not fit into memory together; each may fit alone."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One trial of a pack. `start` is a checkpoint of the trial, `init_adapter` one to begin from; `save_to` an empty
    folder for its checkpoint."""

    params: Mapping[str, Any]
    seed: int
    start: Path | None
    init_adapter: Path | None
    save_to: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`value` is the validation loss in nats a completion token; `curve` has [step, training loss] pairs; `seconds`
    is the trial's share of its pack's time; `adapter_parameters` counts the numbers of what was saved."""

    value: float
    curve: list[tuple[int, float]]
    tokens: int
    seconds: float
    adapter_parameters: int


class Trainer:
    """Holds one base and its data for many trials. Not thread-safe. `seed` orders the rows; trials that would need
    more than `room` bytes of memory in all are refused."""

    def __init__(
        self, model: Any, train: Tokens, validation: Tokens, *, pad: int, seed: int = 0, room: int | None = None
    ) -> None:
        self.model, self.train, self.validation, self.seed, self.room = model, train, validation, seed, room
        self.model.requires_grad_(False)
        self.targets = Targets(model)
        self.lengths = [len(train.row(i)) for i in range(len(train))]
        self.forward = Forward(model, train, validation, pad=pad)
        self._cell: dict[tuple[bool, str, bool], int] = {}  # bytes that autograd keeps for a token, by the method
        self._passes: dict[int, tuple[int, int, int]] = {}  # of a batch size, see _largest
        self._begun_with = memory.used(model.device.type)
        self.broken = False  # the base is not as it was loaded: nothing more may be trained on it
        self.stopwatch: Any = None  # measures adapters as they are served, where a study weighs that

    def run(
        self, members: Sequence[Member], *, total_steps: int, until: int,
        lost: Callable[[], Collection[int]] = frozenset,
    ) -> list[Outcome | TrialFailed | None]:  # fmt: skip
        """Train configurations together from their checkpoints until a step, validate, save each to its folder.

        They must agree in batch size and accumulation, stand at the same step, and be packable unless there is one.
        The learning rate follows its schedule over `total_steps`, wherever the rung ends. `lost` is asked at each
        step for the places of members that are wanted no more, and may raise to abandon all. Returns an outcome for
        each, None for a lost one. Raises PackTooLarge when memory runs out for several.
        """
        begun = time.monotonic()
        try:
            if self.room is not None and (needed := self.needs([m.params for m in members])) > self.room:
                if len(members) > 1:
                    raise PackTooLarge(f"{len(members)} trials together would need {memory.gigabytes(needed)}")
                return [
                    TrialFailed(
                        f"{memory.OUT_OF_MEMORY}: it would need about {memory.gigabytes(needed)}, and a worker may use "
                        f"{memory.gigabytes(self.room)} (TUNESMITH_WORKER_MEMORY_GB)",
                        too_large=True,
                    )
                ]
            adapters = self._adapters([m.params for m in members], [m.seed for m in members])
            with adapters.attached():
                run = _Run(self, adapters, members)
                first = run.restore()
                run.train(first, until, total_steps, lost)
                values = run.validate(lost)
                outcomes: list[Outcome | TrialFailed | None] = []
                seconds = (time.monotonic() - begun) / len(members)
                for k, value in enumerate(values):
                    if k in run.failed:
                        run.failed[k].seconds = seconds
                        outcomes.append(run.failed[k])
                    elif k in run.gone:
                        outcomes.append(None)
                    elif not math.isfinite(value):
                        why = f"the validation loss is {value}"
                        outcomes.append(TrialFailed(why, tokens=run.tokens, seconds=seconds))
                    else:
                        outcomes.append(
                            Outcome(
                                value=value, curve=run.curves[k], tokens=run.tokens, seconds=seconds,
                                adapter_parameters=run.save(k, until),
                            )
                        )  # fmt: skip
                return outcomes
        except (MemoryError, RuntimeError, OSError) as error:
            if not memory.ran_out(error):
                raise
            if len(members) > 1:
                raise PackTooLarge(f"{len(members)} trials do not fit into memory together") from error
            why = f"{memory.OUT_OF_MEMORY} with {dict(members[0].params)}"
            return [TrialFailed(why, seconds=time.monotonic() - begun, too_large=True)]

    def best_pack(self, params: Mapping[str, Any], *, most: int, steps: int) -> int:
        """How many adapters in one pass, up to `most`, give the most steps a second, measured with a step or two of
        each number on some of the base's layers; 1 when company does not pay. The measurement ends before it takes
        as long as a tenth of the `steps` that a worker has before it would take with one."""
        if not packable(params):
            return 1
        rates: dict[int, float] = {}
        begun, allowed, rate = time.monotonic(), math.inf, math.inf
        for count in shares(most):
            if time.monotonic() - begun + 2 * count / rate > allowed:
                break
            if count > 1 and self.room is not None and self.needs([params] * count) > self.room:
                break
            try:
                with self._some_layers() as share:
                    seconds = self._time([params] * count)
            except Exception as error:  # a measurement ends no worker: some bases cannot do without a layer
                log.info("%d adapters in one pass: %s", count, (str(error).splitlines() or [repr(error)])[0])
                break
            log.info("%d adapters in one pass: %.3f s a step of %.0f %% of the base", count, seconds, 100 * share)
            rate = rates[count] = count / seconds
            if count == 1:
                allowed = steps * seconds / share / 10
        best = max(rates, key=rates.__getitem__, default=1)
        return best if best == 1 or rates[best] > rates[1] * _WORTH else 1

    def needs(self, members: Sequence[Mapping[str, Any]]) -> int:
        """Bytes of memory that the process has while it trains configurations together: an estimate, from what
        autograd keeps for a token of this base, tried once. tests/integration/test_memory.py holds it against the
        real peak."""
        params = max(members, key=lambda m: float(m["lora_dropout"]))  # what drops nothing keeps less
        method = bool(params.get("use_dora")), str(params.get("init_lora_weights")), float(params["lora_dropout"]) > 0
        if method not in self._cell:
            self._cell[method] = self._kept(params)
        rows, longest, answers = self._largest(min(int(params["per_device_train_batch_size"]), len(self.train)))
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        # Logits, their softmax and the gradient of both, in fp32; of an adapter values, gradients, two moments, a copy
        a_copy = self._cell[method] * self.forward.cells(rows, longest, len(members)) + 16 * answers * vocabulary
        layers = {name for m in members for name in self.targets.layers(m)}
        sides = sum(sum(self.model.get_submodule(name).weight.shape) for name in layers)
        numbers = max(int(m["r"]) for m in members) * sides
        # PiSSA keeps the base as it was
        twice = 0 if params.get("init_lora_weights", True) is True else self.model.get_memory_footprint()
        # What autograd does not keep, more of it where PEFT's layers add whole results to each other
        spare = 1.5 if packable(params) else 2.0
        return self._begun_with + twice + round(spare * len(members) * (a_copy + 24 * numbers))

    def _largest(self, batch: int) -> tuple[int, int, int]:
        """Of the passes that batches of so many rows are taken in: rows and length of the one with the most tokens, and
        the most tokens that one predicts. A pass of short rows has more of them than one of long rows."""
        if batch not in self._passes:
            order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
            windows = [order[max(0, end - batch) : end] for end in range(len(order), 0, -batch)]
            pieces = [piece for window in windows for piece in _pieces(self.lengths, window)]
            sizes = [(len(piece), max(self.lengths[i] for i in piece)) for piece in pieces]
            answers = [sum(self.lengths[i] - int(self.train.prompt_lengths[i]) for i in piece) for piece in pieces]
            self._passes[batch] = (*max(sizes, key=lambda size: size[0] * size[1]), max(answers))
        return self._passes[batch]

    def _kept(self, params: Mapping[str, Any]) -> int:
        """Bytes that autograd keeps of a forward pass for its backward pass, a token."""
        import torch

        wide = dict(params) | {"r": 8, "target_modules": "all-linear", "layers_to_transform": "all"}
        adapters = self._adapters([wide], [0])
        own = {part.untyped_storage().data_ptr() for part in self.model.parameters()}
        seen: list[weakref.ref[torch.Tensor]] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            seen.append(weakref.ref(tensor))
            return tensor

        longest = max(range(len(self.train)), key=self.lengths.__getitem__)
        with adapters.attached(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.model.train()
            adapters.begin_step(0, mix=_mix)
            loss = self.forward.loss(*self.forward.batch(self.train, [longest] * 2, 1), 1)
            # PEFT throws parts of a DoRA layer's graph away at once: what those kept is free again
            alive = [tensor.untyped_storage() for ref in seen if (tensor := ref()) is not None]
            kept = {storage.data_ptr(): storage.nbytes() for storage in alive}
            total = sum(size for place, size in kept.items() if place not in own)
            del loss
        return total // self.forward.cells(2, self.lengths[longest])

    def _time(self, members: Sequence[Mapping[str, Any]]) -> float:
        """Seconds a step, after one to warm up; on a processor its own ones, whoever else works on it, without what
        the system takes to give memory that is given once."""
        adapters = self._adapters(members, list(range(len(members))))
        clock = _own_seconds if self.model.device.type == "cpu" else time.perf_counter
        with adapters.attached():
            run = _Run(self, adapters, [])
            batches = epoch_of(self.lengths, min(int(members[0]["per_device_train_batch_size"]), len(self.train)),
                               seed=self.seed, epoch=0)  # fmt: skip
            batch = sorted(batches, key=lambda rows: max(self.lengths[i] for i in rows))[len(batches) // 2]
            self.model.train()
            steps, spent, begun = -1, 0.0, 0.0
            while spent < _TIMED:
                if steps == 0:
                    begun = clock()
                adapters.begin_step(0, mix=_mix)
                run.gradients(batch, 1, 0)
                for k, params in enumerate(members):
                    adapters.step(k, rate=0.0, max_norm=float(params["max_grad_norm"]))
                adapters.clear()
                adapters.changed()
                steps += 1
                spent = clock() - begun if steps else 0.0
        return spent / steps

    @contextlib.contextmanager
    def _some_layers(self) -> Iterator[float]:
        """Within the block the base has every n-th of its layers only, the first among them; which share of all.

        They are alike, so numbers of adapters compare as on the whole, but for the head, which then weighs more and
        makes company seem a little less worth than it is."""
        layers = list(getattr(self.model.get_decoder(), "layers", []))
        skipped = [layer for place, layer in enumerate(layers) if place % max(1, len(layers) // _MEASURED)]
        for layer in skipped:
            layer.forward = _as_it_came
        try:
            yield 1 - len(skipped) / max(1, len(layers))
        finally:
            for layer in skipped:
                del layer.forward  # the class's own is found again

    def _adapters(self, members: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Pack | Alone:
        if all(packable(params) for params in members):
            return Pack(self.model, members, seeds, self.targets)
        if len(members) > 1:
            raise ValueError("DoRA and PiSSA train alone")
        if str(members[0].get("init_lora_weights", True)).startswith("pissa"):
            self.targets.check_pissa(members[0])
        self.broken = True  # unless all of it succeeds: PEFT changes the base layer by layer
        alone = Alone(self.model, members[0], seeds[0])
        self.broken = False
        return alone


class _Run:
    """A pack on its way through the steps of one rung."""

    def __init__(self, trainer: Trainer, adapters: Pack | Alone, members: Sequence[Member]) -> None:
        self.trainer, self.adapters, self.members = trainer, adapters, members
        self.curves: list[list[tuple[int, float]]] = [[] for _ in members]
        self.tokens = 0  # of each member
        self.failed: dict[int, TrialFailed] = {}
        self.gone: set[int] = set()

    def restore(self) -> int:
        """Load checkpoints, or the adapters to begin from; returns the step that all stand at."""
        steps = set()
        for k, member in enumerate(self.members):
            step = 0
            if member.start is not None:
                step = int(json.loads((member.start / "progress.json").read_text())["step"])
                if packable(member.params):
                    self.adapters.load(k, member.start / "adapter")
                self.adapters.load_moments(k, member.start, step)
            elif member.init_adapter is not None:
                self.adapters.load(k, member.init_adapter)
            steps.add(step)
        if len(steps) != 1:
            raise ValueError(f"the members of a pack stand at different steps: {sorted(steps)}")
        self.adapters.changed()
        return steps.pop()

    def save(self, k: int, step: int) -> int:
        """Write a member's checkpoint; how many numbers its adapter has."""
        folder = self.members[k].save_to
        count = self.adapters.save(k, folder / "adapter")
        self.adapters.save_moments(k, folder)
        (folder / "progress.json").write_text(json.dumps({"step": step}))
        return count

    def train(self, first: int, until: int, total: int, lost: Callable[[], Collection[int]]) -> None:
        trainer, adapters, params = self.trainer, self.adapters, self.members[0].params
        rows = min(int(params["per_device_train_batch_size"]), len(trainer.train))
        parts = int(params.get("gradient_accumulation_steps", 1))
        trainer.model.train()
        batches = _batches(trainer.lengths, rows, parts, trainer.seed, first)
        for step in range(first, until):
            self._drop(lost())
            if len(self.failed.keys() | self.gone) == len(self.members):
                return
            adapters.begin_step(step, mix=_mix)
            losses = [0.0] * len(self.members)
            for batch in next(batches):
                losses = [a + b for a, b in zip(losses, self.gradients(batch, parts, len(self.members)), strict=True)]
            for k, member in enumerate(self.members):
                if k not in self.failed and k not in self.gone:
                    self._step(k, member.params, step, total, losses[k])
            adapters.clear()
            adapters.changed()

    def _step(self, k: int, params: Mapping[str, Any], step: int, total: int, loss: float) -> None:
        if not math.isfinite(loss):
            why = f"the loss became {loss} at step {step + 1} with learning_rate {params['learning_rate']:g}"
            self._fail(k, why)
            return
        rate = learning_rate(params, step, total)
        norm = self.adapters.step(k, rate=rate, max_norm=float(params["max_grad_norm"]))
        if not math.isfinite(norm):
            self._fail(k, f"the gradient became {norm} at step {step + 1}")
            return
        self.curves[k].append((step + 1, loss))

    def _fail(self, k: int, why: str) -> None:
        self.failed[k] = TrialFailed(why, tokens=self.tokens)
        self.adapters.drop(k)

    def _drop(self, places: Collection[int]) -> None:
        for k in set(places) - self.gone:
            self.gone.add(k)
            self.adapters.drop(k)

    def gradients(self, batch: Sequence[int], parts: int, members: int) -> list[float]:
        """Add the gradients of one of `parts` batches of a step; the members' shares of their mean losses.

        A batch of more tokens than one pass should have is taken in pieces.
        """
        trainer, copies = self.trainer, len(self.adapters)
        supervised = sum(trainer.lengths[i] - int(trainer.train.prompt_lengths[i]) for i in batch)
        losses = [0.0] * copies
        for piece in _pieces(trainer.lengths, batch):
            ids, mask, labels = trainer.forward.batch(trainer.train, piece, copies)
            each = trainer.forward.loss(ids, mask, labels, copies).sum(1) / (supervised * parts)
            each.sum().backward()  # type: ignore[no-untyped-call]
            losses = [a + b for a, b in zip(losses, each.tolist(), strict=True)]
            self.tokens += int(mask.sum()) // copies
        return losses

    def validate(self, lost: Callable[[], Collection[int]]) -> list[float]:
        """Mean negative log-likelihood of a completion token, over all validation rows, of each member."""
        import torch

        trainer, copies = self.trainer, len(self.adapters)
        trainer.model.eval()
        tokens = trainer.validation
        lengths = [len(tokens.row(i)) for i in range(len(tokens))]
        order = sorted(range(len(tokens)), key=lengths.__getitem__)
        totals, count = torch.zeros(copies, dtype=torch.float64), 0
        most = _SCORED_TOKENS if trainer.model.device.type == "cpu" else _FORWARD_TOKENS
        with torch.inference_mode():
            beginning = trainer.forward.beginning(copies)
            for piece in _pieces(lengths, order, most=max(1, most // copies)):
                self._drop(lost())
                losses = trainer.forward.loss(*trainer.forward.batch(tokens, piece, copies), copies, beginning)
                totals += losses.double().sum(1).cpu()
                count += losses.shape[1]
        return [total / count for total in totals.tolist()]


def _own_seconds() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def shares(most: int) -> list[int]:
    """Numbers of adapters that are tried in one pass, by which a group divides well: 1, all, and a half of many."""
    return sorted({1, max(1, most)} | ({-(-most // 2)} if most >= _MANY else set()))


def _as_it_came(hidden_states: Any, *_: Any, **__: Any) -> Any:
    """A layer that does nothing."""
    return hidden_states


def _batches(lengths: Sequence[int], rows: int, parts: int, seed: int, first: int) -> Iterator[list[list[int]]]:
    """For each step from `first` on, its batches."""
    epoch, batches = -1, list[list[int]]()
    number = first * parts
    while True:
        step = []
        for _ in range(parts):
            if number // (len(lengths) // rows) != epoch:
                epoch = number // (len(lengths) // rows)
                batches = epoch_of(lengths, rows, seed=seed, epoch=epoch)
            step.append(batches[number % len(batches)])
            number += 1
        yield step


def _pieces(lengths: Sequence[int], rows: Sequence[int], most: int = _FORWARD_TOKENS) -> list[list[int]]:
    """Rows in runs of at most `most` tokens each, padding included; at least one row a run."""
    pieces: list[list[int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, lengths[row])
        if pieces and longest * (len(pieces[-1]) + 1) <= most:
            pieces[-1].append(row)
        else:
            pieces.append([row])
            longest = lengths[row]
    return pieces


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


def _mix(*numbers: int | str) -> int:
    """One seed from several numbers and names."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "big")
