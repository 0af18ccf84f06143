"""LoRA adapters beside one base in memory: many at once, each row of a batch with its own.

A Linear layer of the base runs once for all rows. What the adapters add, ``B(A(x)) * scale`` in fp32 as PEFT
does it, comes from a stack: the A matrices of all adapters in use one under the other, and the B matrices side
by side, with a mask that leaves each row only its own adapter's rank columns between them. Two matrix products
then serve any number of adapters; a batch that uses a single adapter takes its matrices as they are.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import Conflict, UsageError
from infra.storage import file_digest, folder_digest
from registry import servable

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WEIGHT = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<side>[AB])\.weight|lora_magnitude_vector(?:\.weight)?)")
_SIDE_FILES = frozenset({".safetensors", ".json", ".md", ".txt", ".jinja", ".html"})
_MAX_BYTES = 2 << 30


class BadAdapter(UsageError):
    """A folder that is not an adapter which this base can serve; nothing was loaded."""

    code = "bad_adapter"


class NameTaken(Conflict):
    """An adapter name stands for one content for ever; this one stands for another."""

    http_status = 409
    code = "name_taken"


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """One adapter in memory. `layers` gives for each Linear of the base A of shape [rank, in], with the scale
    already in it, and B of shape [out, rank]. `gains` of DoRA layers, of shape [out], is what the base's own output is
    multiplied with and added again; B then has the same factor in it. Compared by identity."""

    digest: str
    folder: Path
    rank: int
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    gains: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class _Stack:
    """Several adapters' matrices joined. `widths[layer]` tells whose rank columns come in which order."""

    members: tuple[Adapter, ...]
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    widths: Mapping[str, tuple[tuple[int, int], ...]]  # layer -> ((member, rank), ...)

    @property
    def rank(self) -> int:
        return sum(member.rank for member in self.members)


class _Plan:
    """What the layers add in the forward passes under way: one adapter for all rows, or a stack and its masks."""

    def __init__(self, rows: Sequence[Adapter | None], stack: _Stack | None) -> None:
        self.rows, self.stack = tuple(rows), stack
        self._masks: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
        self._gains: dict[str, torch.Tensor | None] = {}

    def gain(self, layer: str) -> torch.Tensor | None:
        """What the base's output is multiplied with and added again, of shape [rows, 1, out]; None: nothing."""
        import torch

        if layer not in self._gains:
            own = [adapter.gains.get(layer) if adapter else None for adapter in self.rows]
            some = next((gain for gain in own if gain is not None), None)
            self._gains[layer] = some if some is None else torch.stack(
                [torch.zeros_like(some) if gain is None else gain for gain in own]
            )[:, None]  # fmt: skip
        return self._gains[layer]

    def delta(self, layer: str, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to the layer's output for input x of shape [rows, positions, in]; None: nothing."""
        from torch.nn.functional import linear

        if self.stack is None:
            (adapter,) = set(self.rows)
            found = adapter.layers.get(layer) if adapter else None
            return None if found is None else linear(linear(x.to(found[0].dtype), found[0]), found[1])
        joined = self.stack.layers.get(layer)
        if joined is None:
            return None
        low = linear(x.to(joined[0].dtype), joined[0])
        return linear(low * self._mask(self.stack.widths[layer], low), joined[1])

    def _mask(self, widths: tuple[tuple[int, int], ...], like: torch.Tensor) -> torch.Tensor:
        """Shape [rows, 1, ranks]: 1 where the column is of the row's own adapter."""
        import torch

        assert self.stack is not None  # noqa: S101 - for the type checker
        if widths not in self._masks:
            owners = [self.stack.members[member] for member, rank in widths for _ in range(rank)]
            mask = [[[owner is adapter for owner in owners]] for adapter in self.rows]
            self._masks[widths] = torch.tensor(mask, dtype=like.dtype, device=like.device)
        return self._masks[widths]


class Adapters:
    """The adapters of one base, under names, and their application to rows of a batch.

    `read`, `get`, `use` and `names` may be called from any thread; all else belongs to the one that runs the model.
    A name stands for one content as long as this object lives, also after `remove`. Of more than `max_adapters` the
    one that was used longest ago goes, as in vLLM; whoever wants it loads it again.
    """

    def __init__(self, model: Any, *, max_rank: int = 256, max_adapters: int = 256, stack_rank: int = 128) -> None:
        """`model`: a causal language model. `stack_rank`: up to this total rank, adapters that no row uses just
        now stay in the stack, since building it anew costs more than their columns."""
        from torch import nn

        head = model.get_output_embeddings()
        self._linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self._max_rank, self._max_adapters, self._stack_rank = max_rank, max_adapters, stack_rank
        self._named: dict[str, Adapter] = {}
        self._digests: dict[str, str] = {}
        self._used: dict[str, float] = {}
        self._hooked: set[str] = set()
        self._stack: _Stack | None = None
        self._plan: _Plan | None = None
        self._active = False

    def names(self) -> list[str]:
        return list(self._named)

    def get(self, name: str) -> Adapter | None:
        return self._named.get(name)

    def use(self, name: str) -> Adapter | None:
        """The same, for a row that will decode with it."""
        if (found := self._named.get(name)) is not None:
            self._used[name] = time.monotonic()
        return found

    def load(self, name: str, folder: Path) -> Adapter:
        """`read` and `add` at once."""
        return self.add(name, self.read(folder))

    def add(self, name: str, adapter: Adapter) -> Adapter:
        """Serve an adapter under a name; the same content again changes nothing.

        Raises NameTaken when the name stands for another content.
        """
        if self._digests.get(name, adapter.digest) != adapter.digest:
            raise NameTaken(
                f"The name {name!r} stands for the adapter {self._digests[name]}, not for {adapter.digest}.",
                hint="Names never change their meaning: give the new adapter a new name.",
            )
        if name in self._named:
            return self._named[name]
        while len(self._named) >= self._max_adapters:
            self.remove(min(self._named, key=self._used.__getitem__))
        for layer in adapter.layers.keys() - self._hooked:
            self._linears[layer].register_forward_hook(partial(self._add_delta, layer))
            self._hooked.add(layer)
        self._named[name] = adapter
        self._digests[name] = adapter.digest
        self._used[name] = time.monotonic()
        return adapter

    def remove(self, name: str) -> bool:
        """Forget a name; False when it is unknown. Rows that decode with the adapter go on."""
        gone = self._named.pop(name, None)
        if gone is not None and self._stack is not None and gone in self._stack.members:
            self._stack = None
        return gone is not None

    @contextmanager
    def rows(self, adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """Within the block the model's forward applies ``adapters[i]`` to row i of its input; None: the base."""
        if self._plan is None or self._plan.rows != tuple(adapters):
            self._plan = _Plan(adapters, self._stacked(adapters) if len(set(adapters)) > 1 else None)
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _add_delta(self, layer: str, module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        if not self._active or self._plan is None:
            return None
        delta = self._plan.delta(layer, args[0])
        if delta is None:
            return None
        if (gain := self._plan.gain(layer)) is not None:
            delta = delta + gain * (output if module.bias is None else output - module.bias)
        return (output + delta).to(output.dtype)

    def _stacked(self, rows: Sequence[Adapter | None]) -> _Stack:
        """A stack that holds the adapters of all rows, and not too many others: the last one if it will do."""
        wanted = [adapter for adapter in dict.fromkeys(rows) if adapter is not None]
        rank = sum(adapter.rank for adapter in wanted)
        old = self._stack
        if old is not None and set(wanted) <= set(old.members) and old.rank <= max(2 * rank, self._stack_rank):
            return old
        members = list(wanted)
        for other in old.members if old is not None else ():
            if other not in members and rank + other.rank <= self._stack_rank:
                members.append(other)
                rank += other.rank
        self._stack = _join(tuple(members))
        return self._stack

    def read(self, folder: Path, digests: Mapping[str, str] | None = None) -> Adapter:
        """Read a plain PEFT adapter (LoRA, rsLoRA or DoRA) and check it against the base, and its files against the
        `digests` that they were sealed with, where those are told.

        Raises BadAdapter: another file, not safetensors, another method, a tensor that is not finite, of another shape
        or for a layer that the base lacks, a rank above the bound.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = _config(folder)
        for name in (CONFIG, WEIGHTS):
            wanted = (digests or {}).get(name)
            if wanted is not None and file_digest(folder / name) != wanted:
                raise BadAdapter(f"{folder / name} is not what was sealed: its digest is not {wanted}.")
        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadAdapter(f"{folder / WEIGHTS} is not a whole safetensors file: {error}.") from error
        sides: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            match = _WEIGHT.fullmatch(key.removeprefix(_PREFIX))
            if match is None:
                raise BadAdapter(f"{folder.name} holds {key!r}, which is no LoRA weight of a Linear layer.")
            sides.setdefault(match["layer"], {})[match["side"] or "m"] = tensor
        if not sides:
            raise BadAdapter(f"{folder / WEIGHTS} holds no tensors.")
        layers, gains = {}, {}
        for layer, pair in sides.items():
            magnitude = pair.pop("m", None)
            layers[layer] = self._checked(config, layer, pair)
            if bool(config.get("use_dora")) != (magnitude is not None):
                raise BadAdapter(f"The adapter's configuration and its tensors disagree about DoRA at {layer}.")
            if magnitude is not None:
                layers[layer], gains[layer] = self._dora(layer, layers[layer], magnitude)
        return Adapter(
            digest=folder_digest(folder),
            folder=folder,
            rank=max(b.shape[1] for _, b in layers.values()),
            layers=layers,
            gains=gains,
        )

    def _dora(
        self, layer: str, pair: tuple[torch.Tensor, torch.Tensor], magnitude: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A layer's matrices and gain, for the output m (W + B A) x over the norm of each row of W + B A (Liu et al.
        2024, DoRA)."""
        import torch

        weight, (a, b) = self._linears[layer].weight, pair
        if tuple(magnitude.shape) != (weight.shape[0],) or not bool(torch.isfinite(magnitude).all()):
            raise BadAdapter(f"The adapter's magnitudes of {layer} are not {weight.shape[0]} finite numbers.")
        norm = torch.linalg.norm(weight.float() + b @ a, dim=1)
        factor = magnitude.to(norm) / norm
        return (a, (b * factor[:, None]).contiguous()), factor - 1

    def _checked(
        self, config: Mapping[str, Any], layer: str, pair: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A, times its scale, and B of one layer, in fp32 on the base's device."""
        import torch

        if layer not in self._linears:
            raise BadAdapter(f"The adapter is for {layer}, a Linear layer that this base does not have.")
        if pair.keys() != {"A", "B"}:
            raise BadAdapter(f"The adapter has only one of the two matrices of {layer}.")
        weight, a, b = self._linears[layer].weight, pair["A"], pair["B"]
        rank = a.shape[0]
        if a.ndim != 2 or tuple(a.shape) != (rank, weight.shape[1]) or tuple(b.shape) != (weight.shape[0], rank):
            raise BadAdapter(
                f"For {layer} the adapter has shapes {list(a.shape)} and {list(b.shape)}, "
                f"but the base's layer is {list(weight.shape)}.",
                hint="It was made for another base.",
            )
        if not 1 <= rank <= self._max_rank:
            raise BadAdapter(f"The adapter's rank {rank} at {layer} is above {self._max_rank}, the most served here.")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise BadAdapter(f"The adapter's matrices of {layer} are not floating point.")
        a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise BadAdapter(f"The adapter's matrices of {layer} hold NaN or infinity.")
        alpha = _pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadAdapter(f"The adapter's lora_alpha {alpha!r} for {layer} is not a finite number.")
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        return (a * scale).contiguous(), b.contiguous()


def _join(members: tuple[Adapter, ...]) -> _Stack:
    import torch

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    widths: dict[str, tuple[tuple[int, int], ...]] = {}
    for layer in dict.fromkeys(layer for member in members for layer in member.layers):
        pairs = [(i, member.layers[layer]) for i, member in enumerate(members) if layer in member.layers]
        layers[layer] = (torch.cat([a for _, (a, _) in pairs], 0), torch.cat([b for _, (_, b) in pairs], 1))
        widths[layer] = tuple((i, a.shape[0]) for i, (a, _) in pairs)
    return _Stack(members, layers, widths)


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, when it asks for nothing beyond LoRA, rsLoRA and DoRA. Raises BadAdapter."""
    if not folder.is_dir():
        raise BadAdapter(f"There is no adapter folder {folder}.")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue  # never opened
        if path.is_symlink() or not path.is_file() or path.suffix not in _SIDE_FILES:
            raise BadAdapter(f"{path.name} does not belong in an adapter folder.", hint="Only safetensors and JSON.")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise BadAdapter(f"{folder} has no {CONFIG}.") from error
    except ValueError as error:
        raise BadAdapter(f"{folder / CONFIG} is not JSON: {error}.") from error
    if not (folder / WEIGHTS).is_file():
        raise BadAdapter(f"{folder} has no {WEIGHTS}.", hint="Weights in other formats are never opened.")
    if (folder / WEIGHTS).stat().st_size > _MAX_BYTES:
        raise BadAdapter(f"{folder / WEIGHTS} is larger than {_MAX_BYTES >> 30} GB.")
    if not isinstance(config, dict):
        raise BadAdapter(f"{folder / CONFIG} is not a JSON object.")
    method = config.get("peft_type")
    if method != "LORA":
        raise BadAdapter(f"The adapter's method is {method}; LoRA is what this engine serves.")
    if (why := servable.beyond_lora(config)) is not None:
        raise BadAdapter(f"The adapter {why}.", hint=servable.PLAIN)
    return config


def _pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The first pattern's value that matches the layer's name, as PEFT matches rank_pattern and alpha_pattern."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise BadAdapter(f"The adapter's alpha_pattern {pattern!r} is no regular expression: {error}.") from error
    return default
