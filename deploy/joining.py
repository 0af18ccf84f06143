"""A row's way into a batch: what of its prompt is in a cache, what is left to be run, and several put together for one
pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from deploy.prefixes import Prefixes

if TYPE_CHECKING:
    import torch

    from deploy.decoding import Row


class CachedLayer(NamedTuple):
    keys: torch.Tensor
    values: torch.Tensor


class Cached(NamedTuple):
    """What a cache is read for: a row's keys and values, a layer each."""

    layers: list[CachedLayer]

    @classmethod
    def of(cls, cache: Any, row: int, columns: torch.Tensor) -> Cached:
        """A copy of one row's columns."""
        return cls(
            [CachedLayer(*(each[row : row + 1, :, columns] for each in (c.keys, c.values))) for c in cache.layers]
        )


@dataclass
class Joining:
    """A row on its way into a batch: `known` tokens of it are in `cache`, `rest` of its prompt are to be run; `since`
    is when it was left so."""

    row: Row
    adapter: str
    known: int
    rest: int
    cache: Any
    since: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, row: Row, prefixes: Prefixes) -> Joining:
        row.joined_at = time.perf_counter()
        adapter, prompt = row.adapter.digest if row.adapter else "", row.request.prompt
        known, cache = prefixes.start(adapter, prompt)
        return cls(row=row, adapter=adapter, known=known, rest=len(prompt) - known, cache=cache)


def together(group: Sequence[Joining]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """The rests of a group's prompts for one pass: tokens, mask, positions and a cache, each row padded on the left,
    and so is what is known of it before. Of one row the cache is its own."""
    import torch
    from transformers import DynamicCache

    known, rest = (max(getattr(j, name) for j in group) for name in ("known", "rest"))
    tokens = torch.zeros((len(group), rest), dtype=torch.long)
    positions = torch.zeros_like(tokens)
    mask = torch.zeros((len(group), known + rest), dtype=torch.long)
    for i, joining in enumerate(group):
        prompt = joining.row.request.prompt
        tokens[i, rest - joining.rest :] = torch.tensor(prompt[joining.known :])
        positions[i, rest - joining.rest :] = torch.arange(joining.known, len(prompt))
        mask[i, known - joining.known : known] = 1
        mask[i, known + rest - joining.rest :] = 1
    if len(group) == 1:
        return tokens, mask, positions, group[0].cache
    cache = DynamicCache()
    some = next((joining.cache for joining in group if joining.known), None)
    for number, layer in enumerate(some.layers if some else ()):
        parts = []
        for name in ("keys", "values"):
            like = getattr(layer, name)
            whole = like.new_zeros(len(group), like.shape[1], known, like.shape[3])
            for i, joining in enumerate(group):
                if joining.known:
                    whole[i, :, known - joining.known :] = getattr(joining.cache.layers[number], name)[0]
            parts.append(whole)
        cache.update(*parts, number)
    return tokens, mask, positions, cache
