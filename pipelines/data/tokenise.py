"""Rows as token ids, made once a data set, split, tokeniser and prompt, and mapped from disk ever after."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import orjson

from infra import storage
from infra.errors import UsageError
from registry import prompts
from registry.bases import Base, load_tokenizer
from registry.datasets import Dataset, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

# Raised when the same rows would give other ids than before
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Ragged rows of token ids, in one flat array.

    Row i is ``ids[offsets[i]:offsets[i + 1]]``: a prompt of ``prompt_lengths[i]`` tokens, and then the completion
    with its end token, which is what the loss is taken on. Rows longer than `max_tokens` are not here but counted in
    `too_long`.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    too_long: int
    digest: str

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def row(self, number: int) -> NDArray[np.int32]:
        """The ids of one row, prompt and completion."""
        return self.ids[self.offsets[number] : self.offsets[number + 1]]

    def sample(self, most: int, seed: int) -> Tokens:
        """At most so many of the rows, drawn without replacement; a function of its arguments."""
        import numpy as np

        if most >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False))
        rows = [self.row(int(number)) for number in chosen]
        return replace(
            self,
            ids=np.concatenate(rows),
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
            prompt_lengths=self.prompt_lengths[chosen],
        )


def tokenised(dataset: Dataset, split: Split, base: Base, *, max_tokens: int, system: str | None) -> Tokens:
    """The tokens of a split; memory-mapped, so that many processes share one copy.

    Raises UsageError when every row is longer than `max_tokens`.
    """
    recipe = {
        "format": FORMAT,
        "dataset": dataset.digest,
        "split": split,
        "tokenizer": base.tokenizer_digest,
        "template": base.template_digest,
        "max_tokens": max_tokens,
        "system": system,
    }
    digest = storage.text_digest(orjson.dumps(recipe, option=orjson.OPT_SORT_KEYS).decode())
    if not storage.has("tokens", digest):
        _make(digest, dataset, split, base, max_tokens, system)
    return _open(digest)


def _make(digest: str, dataset: Dataset, split: Split, base: Base, max_tokens: int, system: str | None) -> None:
    import numpy as np

    tokenizer = load_tokenizer(base.folder)
    ids: list[NDArray[np.int32]] = []
    prompt_lengths: list[int] = []
    rows = dataset.rows(split)
    for row in rows:
        try:
            tokens, prompt_length = prompts.encode_pair(tokenizer, row.messages, system=system)
        except ValueError as error:
            raise UsageError(
                f"The base {base.id} cannot take the {split} row {row.id}: {error}.",
                hint="Some chat templates know no system message; put its text into the first user message.",
            ) from error
        if len(tokens) <= max_tokens:
            ids.append(np.asarray(tokens, np.int32))
            prompt_lengths.append(prompt_length)
    if not ids:
        raise UsageError(
            f"All {len(rows)} {split} rows are longer than {max_tokens} tokens.",
            hint="Raise data.quality.max_tokens, or shorten the rows.",
        )
    if too_long := len(rows) - len(ids):
        log.warning("%d of %d %s rows are longer than %d tokens and left out", too_long, len(rows), split, max_tokens)
    with storage.scratch("tokens") as folder:
        np.save(folder / "ids.npy", np.concatenate(ids))
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64))
        np.save(folder / "prompt_lengths.npy", np.asarray(prompt_lengths, np.int32))
        (folder / "meta.json").write_bytes(orjson.dumps({"too_long": too_long}))
        storage.keep("tokens", digest, folder)


def _open(digest: str) -> Tokens:
    import numpy as np

    folder = storage.get("tokens", digest)
    return Tokens(
        ids=np.load(folder / "ids.npy", mmap_mode="r"),
        offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        prompt_lengths=np.load(folder / "prompt_lengths.npy", mmap_mode="r"),
        too_long=orjson.loads((folder / "meta.json").read_bytes())["too_long"],
        digest=digest,
    )
