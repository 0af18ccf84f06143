"""Keys and values in one piece of memory: whatever joins and leaves, each row keeps its own."""

from __future__ import annotations

import random

import torch

from deploy.memory import Layer

HEADS, SIZE, CELLS = 2, 3, 60


def _draw(length: int) -> torch.Tensor:
    return torch.randn(1, HEADS, length, SIZE)


def _held(layer: Layer, rows: list[torch.Tensor]) -> None:
    """The rows as they should be: ended by the same column, zeros before them."""
    assert layer.keys.shape == (len(rows), HEADS, layer.width, SIZE)
    for number, row in enumerate(rows):
        start = layer.width - row.shape[-2]
        assert torch.equal(layer.keys[number, :, start:], row[0])
        assert torch.equal(layer.values[number, :, start:], -row[0])
        assert not layer.keys[number, :, :start].any()


def test_rows_keep_their_own_through_joins_steps_and_leaves() -> None:
    chance = random.Random(7)
    torch.manual_seed(7)
    for _ in range(200):
        layer = Layer(CELLS, torch.full((1, HEADS, 1, SIZE), torch.nan))
        layer._memory[0].fill_(torch.nan)  # what was never written must not show
        layer._memory[1].fill_(torch.nan)
        rows: list[torch.Tensor] = []
        most: list[int] = []
        for _ in range(30):
            what = chance.choice(("add", "step", "step", "keep"))
            if what == "add":
                row = _draw(chance.randint(1, 9))
                long = row.shape[-2] + chance.randint(1, 6)
                if max([long, *most]) * (len(rows) + 1) > CELLS:
                    continue
                layer.add(row, -row, max([long, *most]))
                rows.append(row)
                most.append(long)
            elif what == "step" and rows and all(r.shape[-2] < m for r, m in zip(rows, most, strict=True)):
                new = torch.randn(len(rows), HEADS, 1, SIZE)
                layer.update(new, -new)
                rows = [torch.cat([row, new[n : n + 1]], -2) for n, row in enumerate(rows)]
            elif what == "keep" and rows:
                kept = sorted(chance.sample(range(len(rows)), chance.randint(0, len(rows) - 1)))
                rows, most = [rows[n] for n in kept], [most[n] for n in kept]
                layer.keep(kept, layer.width - max((row.shape[-2] for row in rows), default=layer.width))
            _held(layer, rows)
