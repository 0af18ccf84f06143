"""What the prompts of an adapter begin with, kept as keys and values: a system prompt and the chat template's own
words are computed once and not for every request (vLLM calls it automatic prefix caching)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SHORTEST = 8  # tokens; less is not worth keeping
_LONGEST = 1024


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    tokens: tuple[int, ...]
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class Prefixes:
    """Of each adapter, by its digest, the longest beginning that two requests in a row shared; nothing is kept that
    one request alone had. At most `most_tokens` in all, those used longest ago go first. Belongs to one thread."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._kept: OrderedDict[str, _Beginning] = OrderedDict()
        self._last: OrderedDict[str, tuple[int, ...]] = OrderedDict()  # an adapter's last prompt

    def start(self, adapter: str, prompt: Sequence[int]) -> tuple[int, Any]:
        """How many of the prompt's tokens need not be computed, and a cache that holds them; never all of them, since
        the last one predicts."""
        from transformers import DynamicCache

        cache, known = DynamicCache(), self._kept.get(adapter)
        shared = 0 if known is None else min(_common(known.tokens, prompt), len(prompt) - 1)
        if known is None or shared < _SHORTEST:
            return 0, cache
        self._kept.move_to_end(adapter)
        for number, (keys, values) in enumerate(known.layers):
            cache.update(keys[:, :, :shared], values[:, :, :shared], number)
        return shared, cache

    def learn(self, adapter: str, prompt: Sequence[int], cache: Any) -> None:
        """Keep what this prompt and the adapter's last one share, where that is more than what is kept offers; `cache`
        holds the whole prompt, of one row."""
        begin = tuple(prompt[:_LONGEST])
        common = _common(self._last.get(adapter, ()), begin)
        self._last[adapter] = begin
        self._last.move_to_end(adapter)
        if len(self._last) > self.most_tokens // _SHORTEST:
            self._last.popitem(last=False)
        known = self._kept.get(adapter)
        if common < _SHORTEST or (known is not None and common <= _common(known.tokens, begin)):
            return
        layers = [(layer.keys[:, :, :common].clone(), layer.values[:, :, :common].clone()) for layer in cache.layers]
        self._kept[adapter] = _Beginning(tokens=begin[:common], layers=layers)
        self._kept.move_to_end(adapter)
        while sum(len(each.tokens) for each in self._kept.values()) > self.most_tokens:
            self._kept.popitem(last=False)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return number
    return min(len(one), len(other))
