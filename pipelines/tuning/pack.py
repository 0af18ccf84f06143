"""Several LoRA adapters trained in one pass over one frozen base.

Every adapter sees its own copies of the rows, so the base's matrices are multiplied once with the rows of all, and
the adapters' small ones as a batch. All numbers that are trained stand in one matrix, a line an adapter, padded with
zeros to the largest rank: padding has no gradient, and Adam leaves what has none where it is. So what an adapter
becomes does not depend on who trained beside it, up to how the machine rounds products of other shapes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.tuning.methods import Targets

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."  # as PEFT names an adapter's tensors
_DROPPED = 256  # dropout's rate is a whole number of these parts, since masks are drawn a byte a value
_SPARE = 1 << 16  # values that are drawn for a step's masks beyond the longest of them, so that each begins elsewhere


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a layer's A `[r, inputs]` and B `[outputs, r]` stand in each adapter's line."""

    number: int
    name: str
    module: Any
    a: int
    b: int
    inputs: int
    outputs: int
    members: tuple[bool, ...]  # which adapters have this layer


class Pack:
    """The trainable adapters of some configurations, fp32 whatever the base's dtype. Not thread-safe.

    `members` are trials' params; LoRA and rsLoRA only. `seeds` are theirs: they decide A's first values and the
    dropout. Within `attached` the model's forward takes ``len(members)`` times as many rows, an adapter's together.
    """

    def __init__(self, model: Any, members: Sequence[Mapping[str, Any]], seeds: Sequence[int], targets: Targets):
        import torch

        self.model, self.members, self.seeds = model, list(members), list(seeds)
        self.configs = [targets.config(params) for params in members]
        self.ranks = [int(params["r"]) for params in members]
        self.rank = max(self.ranks)
        wanted = [set(targets.layers(params)) for params in members]
        self.places: list[_Place] = []
        size = 0
        for name, module in model.named_modules():
            if not any(name in layers for layers in wanted):
                continue
            outputs, inputs = module.weight.shape
            self.places.append(
                _Place(
                    number=len(self.places), name=name, module=module, a=size, b=size + self.rank * inputs,
                    inputs=inputs, outputs=outputs, members=tuple(name in layers for layers in wanted),
                )
            )  # fmt: skip
            size += self.rank * (inputs + outputs)
        device, self.dtype = model.device, self.places[0].module.weight.dtype
        self.values = torch.zeros(len(members), size, device=device)
        self.gradients = torch.zeros_like(self.values)
        self.lines = [torch.nn.Parameter(line) for line in self.values]
        self.optimizers = [
            torch.optim.AdamW([line], lr=1.0, weight_decay=float(params["weight_decay"]), fused=True)
            for line, params in zip(self.lines, members, strict=True)
        ]
        for line, gradient in zip(self.lines, self.gradients, strict=True):
            line.grad = gradient
        scales = [_scale(params) for params in members]
        self._scales = torch.tensor(scales, device=device, dtype=torch.float32).to(self.dtype)[:, None, None]
        self._rates = [round(float(params["lora_dropout"]) * _DROPPED) for params in members]
        wide = {"target_modules": "all-linear"}  # of the base, so that masks do not depend on who trains beside
        self._widest = max(model.get_submodule(name).weight.shape[1] for name in targets.layers(wide))
        self._shadow = self._make_shadow()
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._mix: Any = None
        self._step = 0
        self._drawn = torch.empty(len(members), 0, device=device, dtype=self.dtype)
        self._masked: Counter[str] = Counter()
        for k, seed in enumerate(seeds):
            self._draw(k, seed)

    def __len__(self) -> int:
        return len(self.members)

    def _draw(self, k: int, seed: int) -> None:
        """A as PEFT draws it (kaiming uniform with a of the root of 5, that is within one over the root of the
        inputs), B zero."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        for place in self.places:
            if place.members[k]:
                bound = 1 / math.sqrt(place.inputs)
                drawn = torch.rand(self.ranks[k], place.inputs, generator=generator) * (2 * bound) - bound
                self._a(self.values, place)[k, : self.ranks[k]] = drawn

    def _a(self, lines: torch.Tensor, place: _Place) -> torch.Tensor:
        """`[adapters, rank, inputs]`, a view."""
        return lines[:, place.a : place.b].view(-1, self.rank, place.inputs)

    def _b(self, lines: torch.Tensor, place: _Place) -> torch.Tensor:
        """`[adapters, outputs, rank]`, a view."""
        return lines[:, place.b : place.b + self.rank * place.outputs].view(-1, place.outputs, self.rank)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the model's forward is that of base and adapters; `changed` is called first and after
        every step."""
        originals = [(place.module, place.module.forward) for place in self.places]
        for place in self.places:
            place.module.forward = functools.partial(self._forward, place)
        self.changed()
        try:
            yield
        finally:
            for module, forward in originals:
                del module.forward  # the class's own is found again
                assert module.forward == forward  # noqa: S101 - somebody else's patch would be lost

    def _make_shadow(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each place A and B of all adapters, each in one piece: products of parts of lines would copy them first,
        every time."""
        import torch

        count, rank = len(self.members), self.rank
        return [
            (
                torch.empty(count, rank, place.inputs, device=self.values.device, dtype=self.dtype),
                torch.empty(count, place.outputs, rank, device=self.values.device, dtype=self.dtype),
            )
            for place in self.places
        ]

    def changed(self) -> None:
        """Bring the copies that the products are made with up to the values."""
        for place, (a, b) in zip(self.places, self._shadow, strict=True):
            a.copy_(self._a(self.values, place))
            b.copy_(self._b(self.values, place))

    def begin_step(self, step: int, *, mix: Any) -> None:
        """The masks of the forward passes that follow are a function of each adapter's seed and this step; `mix` makes
        one seed of numbers and names."""
        self._step, self._mix = step, mix
        self._drawn = self._drawn[:, :0]
        self._masked.clear()

    def _forward(self, place: _Place, x: torch.Tensor) -> torch.Tensor:
        import torch

        module, shape = place.module, x.shape
        flat = x.reshape(len(self.members), -1, place.inputs)
        if not torch.is_grad_enabled():
            y = torch.nn.functional.linear(flat, module.weight, module.bias)
            a, b = self._shadow[place.number]
            h = torch.bmm(flat, a.transpose(1, 2)).mul_(self._scales)
            y.baddbmm_(h, b.transpose(1, 2))
        else:
            y = _function().apply(flat, self._anchor, self, place)
        return y.view(*shape[:-1], place.outputs)

    def _mask(self, place: _Place, x: torch.Tensor) -> torch.Tensor | None:
        """What dropout multiplies the adapters' input with, a view; None where no adapter of the layer drops anything.

        An adapter's masks of a step are parts of one line of random values, each from a place of its own: values that
        are independent in a mask, and cost a sixth of what fresh ones for each layer do (a tenth of a step).
        """
        if not self.model.training or not any(self._rates[k] for k in range(len(self)) if place.members[k]):
            return None
        size = x[0].numel()
        if self._drawn.shape[1] < size + _SPARE:
            self._draw_masks(x.shape[1] * max(self._widest, place.inputs) + _SPARE)
        self._masked[place.name] += 1  # a step may have several passes
        begin = self._mix(self._step, self._masked[place.name], place.name) % (self._drawn.shape[1] - size + 1)
        return self._drawn[:, begin : begin + size].view(x.shape)

    def _draw_masks(self, length: int) -> None:
        """Values of masks, a line an adapter: 0 where it drops, else what keeps the mean."""
        import torch

        device = self.values.device
        self._drawn = torch.ones(len(self), length, device=device, dtype=self.dtype)
        for k, rate in enumerate(self._rates):
            if rate:
                generator = torch.Generator(device).manual_seed(self._mix(self.seeds[k], self._step, length))
                words = torch.empty(-(-length // 8), dtype=torch.int64, device=device)
                words.random_(-(2**63), None, generator=generator)
                kept = words.view(torch.uint8)[:length] >= rate
                self._drawn[k].copy_(kept).mul_(_DROPPED / (_DROPPED - rate))

    # ------------------------------------------------------------ an adapter alone

    def step(self, k: int, *, rate: float, max_norm: float) -> float:
        """Clip and step one adapter; returns the norm of its gradient before. Nothing is stepped when that is not
        finite."""
        norm = float(self.gradients[k].norm())
        if math.isfinite(norm):
            if norm > max_norm:
                self.gradients[k].mul_(max_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
            self.optimizers[k].param_groups[0]["lr"] = rate
            self.optimizers[k].step()
        return norm

    def clear(self) -> None:
        """Forget the gradients of all."""
        self.gradients.zero_()

    def drop(self, k: int) -> None:
        """An adapter that failed becomes the base, so that its rows disturb nobody by what is not a number."""
        self.values[k].zero_()

    def save(self, k: int, folder: Path) -> int:
        """Plain PEFT: adapter_config.json and adapter_model.safetensors; returns how many numbers it has."""
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        self.configs[k].save_pretrained(folder)
        tensors = {f"{_PREFIX}{name}.weight": part for name, part in self._parts(k, self.values[k])}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return sum(part.numel() for part in tensors.values())

    def load(self, k: int, folder: Path) -> None:
        """Take an adapter's weights. Raises ValueError when its rank or its layers are not this one's."""
        self._fill(k, folder / "adapter_model.safetensors", {"": self.values[k]}, folder)

    def save_moments(self, k: int, folder: Path) -> None:
        """What AdamW remembers, by layer."""
        from safetensors.torch import save_file

        state = self.optimizers[k].state[self.lines[k]]
        tensors = {
            f"{which}.{_PREFIX}{name}.weight": part
            for which in ("exp_avg", "exp_avg_sq")
            for name, part in self._parts(k, state[which])
        }
        save_file(tensors, folder / "optimizer.safetensors")

    def load_moments(self, k: int, folder: Path, step: int) -> None:
        import torch

        moments = {which: torch.zeros_like(self.values[k]) for which in ("exp_avg", "exp_avg_sq")}
        self._fill(k, folder / "optimizer.safetensors", {f"{w}.": line for w, line in moments.items()}, folder)
        at = torch.tensor(float(step), device=self.values.device)
        self.optimizers[k].state[self.lines[k]] = {"step": at, **moments}

    def _parts(self, k: int, line: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """An adapter's matrices without padding, as PEFT names them; copies."""
        r = self.ranks[k]
        for place in self.places:
            if place.members[k]:
                yield f"{place.name}.lora_A", self._a(line[None], place)[0, :r].clone()
                yield f"{place.name}.lora_B", self._b(line[None], place)[0, :, :r].clone()

    def _fill(self, k: int, file: Path, lines: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write a file's tensors into lines, by the prefix of their names."""
        from safetensors.torch import load_file

        tensors, r = load_file(file), self.ranks[k]
        for prefix, line in lines.items():
            for place in self.places:
                if not place.members[k]:
                    continue
                a = tensors.pop(f"{prefix}{_PREFIX}{place.name}.lora_A.weight", None)
                b = tensors.pop(f"{prefix}{_PREFIX}{place.name}.lora_B.weight", None)
                if a is None or b is None or a.shape[0] != r or b.shape[1] != r:
                    raise ValueError(f"the adapter in {folder} does not fit: other target modules or rank")
                self._a(line[None], place)[0, :r] = a
                self._b(line[None], place)[0, :, :r] = b
        if tensors:
            raise ValueError(f"the adapter in {folder} does not fit: other target modules or rank")


def _scale(params: Mapping[str, Any]) -> float:
    """What B A is multiplied with: alpha / r, and alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
    r = int(params["r"])
    return float(params["lora_alpha"]) / (math.sqrt(r) if params.get("use_rslora") else r)


@functools.cache
def _function() -> Any:
    """The autograd function of a frozen linear layer with a pack's adapters; torch is imported with it.

    y = x W' + s (d x) A' B', and for the gradient g of y: with u = s g B, that of x is g W + d (u A), that of A is
    u' (d x), that of B is g' s (d x) A'. The adapters' gradients are added where they are kept, so that autograd
    carries those of x alone.
    """
    import torch

    class PackedLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, pack: Pack, place: _Place) -> torch.Tensor:
            module = place.module
            mask = pack._mask(place, x)
            dropped = x if mask is None else x * mask
            y = torch.nn.functional.linear(x, module.weight, module.bias)
            a, b = pack._shadow[place.number]
            h = torch.bmm(dropped, a.transpose(1, 2)).mul_(pack._scales)
            y.baddbmm_(h, b.transpose(1, 2))
            ctx.save_for_backward(dropped, h, mask)
            ctx.pack, ctx.place = pack, place
            return y

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            pack, place, g = ctx.pack, ctx.place, grads[0]
            dropped, h, mask = ctx.saved_tensors
            a, b = pack._shadow[place.number]
            u = torch.bmm(g, b).mul_(pack._scales)
            pack._a(pack.gradients, place).add_(torch.bmm(u.transpose(1, 2), dropped))
            pack._b(pack.gradients, place).add_(torch.bmm(g.transpose(1, 2), h))
            if not ctx.needs_input_grad[0]:
                return None, None, None, None
            x_grad = torch.matmul(g, place.module.weight)
            if mask is None:
                x_grad.baddbmm_(u, a)
            else:
                x_grad.addcmul_(torch.bmm(u, a), mask)
            return x_grad, None, None, None

    return PackedLinear
