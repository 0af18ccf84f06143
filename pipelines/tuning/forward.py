"""The loss of a batch of rows, without the work that a plain forward pass wastes.

The head works where a token is predicted only. What all prompts begin with (a system prompt, the chat template's own
words) goes through the model once a pass and not once a row: attention looks back only, so what comes after it
cannot change it. Whether a model's answers are the same that way is tried when it is opened.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.data.tokenise import Tokens

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a position that nothing is asked of
_SHORTEST = 4  # tokens; a shorter common beginning is not worth its own pass
# Tokens that a pass of its own must save where products are fast. Measured in bf16 with AMX: 60 saved cost a step a
# tenth, 120 cost and gained nothing, 300 gained 7 %. In fp32 it always paid
_SAVED = 120
_TRIED = 2  # rows, the shortest ones


class Forward:
    """A model's loss on rows of `data`. `direct`: decoder and head are run apart; `prefix`: the ids that all prompts
    begin with, None where they are not shared."""

    def __init__(self, model: Any, *data: Tokens, pad: int) -> None:
        import torch

        self.model, self.pad = model, pad
        self.direct = False
        self.prefix: torch.Tensor | None = None
        whole = self._try(data[0])
        self.direct = True
        # Some scale or cap what the decoder gives, and are then run whole
        self.direct = bool((self._try(data[0]) - whole).abs().max() < 1e-3)
        common = common_beginning(*data)
        if len(common) >= _SHORTEST:
            self.prefix = torch.tensor(common, device=model.device)
            # Some models keep no cache of the usual kind. In bf16 a product of another shape rounds otherwise: 0.05 to
            # 0.07 were measured with SmolLM2-135M, without a sign, and a wrong cache is off by ten times that
            allowed = 1e-3 if self.model.dtype.itemsize == 4 else 0.2
            if (self._try(data[0]) - whole).abs().mean() > allowed:
                self.prefix = None

    def _try(self, tokens: Tokens) -> torch.Tensor:
        import torch

        self.model.eval()
        rows = sorted(range(len(tokens)), key=lambda number: len(tokens.row(number)))[:_TRIED]
        with torch.inference_mode():
            return self.loss(*self.batch(tokens, rows, 1), 1, self.beginning(1))

    def batch(
        self, tokens: Tokens, rows: Sequence[int], copies: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Right-padded ids, mask and labels of rows, all of them `copies` times; labels hold the completion's tokens,
        shifted to where they are predicted."""
        import torch

        longest = max(len(tokens.row(i)) for i in rows)
        ids = torch.full((len(rows), longest), self.pad, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
        for n, i in enumerate(rows):
            row = torch.from_numpy(tokens.row(i).astype("int64"))
            prompt = int(tokens.prompt_lengths[i])
            ids[n, : len(row)] = row
            mask[n, : len(row)] = 1
            labels[n, prompt - 1 : len(row) - 1] = row[prompt:]
        device = self.model.device
        return ids.repeat(copies, 1).to(device), mask.repeat(copies, 1).to(device), labels.repeat(copies, 1).to(device)

    def cells(self, rows: int, length: int, copies: int = 1) -> int:
        """Tokens that go through the model for rows of a length, padding included, of each of `copies`."""
        shared = len(self.prefix) if self._shares(rows, copies) and self.prefix is not None else 0
        return shared + rows * (length - shared)

    def _shares(self, rows: int, copies: int) -> bool:
        """Whether what all begin with gets a pass of its own, for so many rows of each copy."""
        least = 1 if self.model.dtype.itemsize == 4 else _SAVED
        return self.prefix is not None and copies * (rows - 1) * len(self.prefix) >= least

    def beginning(self, copies: int) -> Any:
        """Keys and values of `prefix`, once for each of `copies`; None where it is not shared."""
        from transformers import DynamicCache

        if self.prefix is None:
            return None
        cache = DynamicCache(config=self.model.config)
        first = self.prefix.expand(copies, -1)
        self.model.get_decoder()(input_ids=first, past_key_values=cache, use_cache=True)
        return cache

    def loss(
        self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, copies: int, beginning: Any = None
    ) -> torch.Tensor:
        """The negative log-likelihood of each completion token in fp32, `[copies, tokens]`.

        `ids`, mask and labels are `[copies * rows, length]`, padded on the right; labels stand where they are
        predicted and are IGNORED elsewhere. All rows begin with `prefix`; its `beginning`, where that
        is worth it, is made anew unless given.
        """
        import torch

        given: dict[str, Any] = {"use_cache": False}
        rows = len(ids) // copies
        if (prefix := self.prefix) is not None and (beginning is not None or self._shares(rows, copies)):
            # What follows is added to a cache
            cache = self.beginning(copies) if beginning is None else copy.deepcopy(beginning)
            cache.batch_repeat_interleave(rows)
            given = {"use_cache": True, "past_key_values": cache}
            ids, labels = ids[:, len(prefix) :], labels[:, len(prefix) :]
        chosen = labels != IGNORED
        if self.direct:
            hidden = self.model.get_decoder()(input_ids=ids, attention_mask=mask, **given).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[chosen])
        else:
            logits = self.model(input_ids=ids, attention_mask=mask, **given).logits[chosen]
        return torch.nn.functional.cross_entropy(logits.float(), labels[chosen], reduction="none").view(copies, -1)


def common_beginning(*data: Tokens) -> list[int]:
    """The ids that all prompts begin with; the last token of a prompt is never among them, since it predicts."""
    common = data[0].row(0)[: int(min(tokens.prompt_lengths.min() for tokens in data)) - 1]
    for tokens in data:
        for number in range(len(tokens)):
            differs = (tokens.row(number)[: len(common)] != common).nonzero()[0]
            if len(differs):
                common = common[: differs[0]]
    return [int(token) for token in common]
