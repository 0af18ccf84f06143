"""Keys and values in one piece of memory: whatever joins and leaves, each row keeps its own."""

from __future__ import annotations

import random

import torch

from deploy.memory import Layer

HEADS, SIZE, CELLS = 2, 3, 60
WIDER = torch.ones(5)  # values may be of another size than keys


def _values(keys: torch.Tensor) -> torch.Tensor:
    return -keys[..., :1] * WIDER


def _draw(length: int) -> torch.Tensor:
    return torch.randn(1, HEADS, length, SIZE)


def _held(layer: Layer, rows: list[torch.Tensor]) -> None:
    """The rows as they should be: ended by the same column, zeros before them."""
    assert layer.keys.shape == (len(rows), HEADS, layer.width, SIZE)
    for number, row in enumerate(rows):
        start = layer.width - row.shape[-2]
        assert torch.equal(layer.keys[number, :, start:], row[0])
        assert torch.equal(layer.values[number, :, start:], _values(row)[0])
        assert not layer.keys[number, :, :start].any()


def test_rows_keep_their_own_through_joins_steps_and_leaves() -> None:
    chance = random.Random(7)
    torch.manual_seed(7)
    for _ in range(200):
        layer = Layer(CELLS, _draw(1), _values(_draw(1)))
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
                layer.add(row, _values(row), max([long, *most]))
                rows.append(row)
                most.append(long)
            elif what == "step" and rows and all(r.shape[-2] < m for r, m in zip(rows, most, strict=True)):
                new = torch.randn(len(rows), HEADS, 1, SIZE)
                layer.update(new, _values(new))
                rows = [torch.cat([row, new[n : n + 1]], -2) for n, row in enumerate(rows)]
            elif what == "keep" and rows:
                kept = sorted(chance.sample(range(len(rows)), chance.randint(0, len(rows) - 1)))
                rows, most = [rows[n] for n in kept], [most[n] for n in kept]
                layer.keep(kept, layer.width - max((row.shape[-2] for row in rows), default=layer.width))
            _held(layer, rows)
