"""Keys and values of a batch: one piece of memory a layer, for as many cells as the batch may have, given once.

A cell is one token of one row. Rows stand below each other, ended by the same column and padded on the left with zeros
(what a mask hides must still be finite). A step writes one column in place; only when a row joins or leaves are those
of others moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    import torch


class Layer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's; `keys` and `values` are views of what is in use, [rows, heads, width, size of a head]."""

    def __init__(self, cells: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._cells = cells
        self._shapes = [(each.shape[1], each.shape[3]) for each in (keys, values)]  # which may differ
        self._memory = [
            each.new_empty(cells * heads * size)
            for each, (heads, size) in zip((keys, values), self._shapes, strict=True)
        ]
        self.rows = self.width = self.wide = 0
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One more column of all rows."""
        start, self.width = self.width, self.width + key_states.shape[-2]
        for whole, new in zip(self._whole(), (key_states, value_states), strict=True):
            whole[: self.rows, :, start : self.width] = new
        self._show()
        return self.keys, self.values

    def add(self, keys: torch.Tensor, values: torch.Tensor, wide: int) -> None:
        """One more row, [1, heads, length, size]; from now on no row will be wider than `wide`."""
        if self.rows and wide <= self.wide and (self.rows + 1) * self.wide <= self._cells:
            wide = self.wide  # it has room, and nobody need move
        length, before = keys.shape[-2], self.width
        width = max(before, length)
        moved = self.rows and (wide != self.wide or width != before)
        others = [self.keys.clone(), self.values.clone()] if moved else []
        self.wide, self.width = wide, width
        for number, (whole, new) in enumerate(zip(self._whole(), (keys, values), strict=True)):
            if others:
                whole[: self.rows, :, : width - before] = 0
                whole[: self.rows, :, width - before : width] = others[number]
            whole[self.rows, :, : width - length] = 0
            whole[self.rows, :, width - length : width] = new[0]
        self.rows += 1
        self._show()

    def keep(self, rows: Sequence[int], dead: int) -> None:
        """These rows alone, in this order, without the first `dead` columns."""
        self.rows, self.width = len(rows), self.width - dead if rows else 0
        for whole, used in zip(self._whole(), (self.keys, self.values), strict=True):
            whole[: self.rows, :, : self.width] = used[list(rows), :, dead : dead + self.width]
        self._show()

    def _whole(self) -> list[torch.Tensor]:
        most = self._cells // self.wide if self.wide else 0
        return [
            memory[: most * heads * self.wide * size].view(most, heads, self.wide, size)
            for memory, (heads, size) in zip(self._memory, self._shapes, strict=True)
        ]

    def _show(self) -> None:
        self.keys, self.values = (whole[: self.rows, :, : self.width] for whole in self._whole())


class Memory(Cache):  # type: ignore[misc]
    """Of all layers of a batch, shaped like another cache's."""

    layers: list[Layer]

    def __init__(self, cells: int, like: Any) -> None:
        super().__init__(layers=[Layer(cells, layer.keys, layer.values) for layer in like.layers])

    def add(self, cache: Any, wide: int) -> None:
        """The row that a cache holds; see `Layer.add`."""
        for layer, new in zip(self.layers, cache.layers, strict=True):
            layer.add(new.keys, new.values, wide)

    def keep(self, rows: Sequence[int], dead: int) -> None:
        for layer in self.layers:
            layer.keep(rows, dead)
