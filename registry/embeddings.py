"""Where words lie in a base's embeddings, for the profile that traffic is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from registry import bases
from registry.bases import Base
from registry.profile import AXES

_TOKENS = 20_000  # that the axes are taken of, evenly from all: their covariance is what matters, and memory


class WordPlaces:
    """Places words along the AXES principal components of a base's token embeddings.

    The axes are the base's own and not those of training rows: axes that are fitted to few rows spread them more than
    fresh rows of the same kind, which would look like drift.
    """

    def __init__(self, base: Base) -> None:
        import torch

        self._tokenizer = bases.load_tokenizer(base.folder)
        weight = bases.load_model(base.folder, base.dtype).get_input_embeddings().weight
        some = weight[:: -(-len(weight) // _TOKENS)].float()
        mean = some.mean(0)
        _, vectors = torch.linalg.eigh((some - mean).T @ (some - mean))  # by ascending eigenvalues
        self._weight, self._mean, self._axes = weight, mean, vectors[:, -AXES:].flip(1)

    def __call__(self, words: Sequence[str]) -> list[list[float]]:
        """Of each word the mean of its tokens' places, as in the middle of a sentence; at the mean without tokens."""
        ids = self._tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
        return [
            ((self._weight[tokens].float().mean(0) - self._mean) @ self._axes).tolist() if tokens else [0.0] * AXES
            for tokens in ids
        ]
