"""Which rows say the same: exactly, or nearly.

Prompts are compared by the Jaccard similarity of their character 4-grams, after `registry.datasets.question_key`.
Candidates come from MinHash LSH (Leskovec et al., Mining of Massive Datasets, chapter 3); each is then verified
on the 4-grams themselves, so a hash never drops a row. 4-grams that stand in more than a third of the prompts are
a template ("Classify this request: ...") and are not counted.

Characters miss a short copy with one word changed, which gives an evaluation away all the same. Copies are found by
words: two prompts with the same answer are copies when leaving one word out of each (or of one) makes them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Literal

from registry.datasets import Row, normalise, question_key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Grams = NDArray[np.uint32]

# Nearly the same question. On CLINC150's short requests 0.9 finds what differs by a plural or an article, and
# leaves paraphrases alone, which are what such a data set teaches by.
SAME = 0.9
# Alike enough to give each other's answers away, so never in two splits.
ALIKE = 0.75

_GRAM = 4
_LEAST_GRAMS = 8  # shorter texts are the same only when equal: one letter changes too much of them
_TEMPLATE_SHARE = 1 / 3
_TEMPLATE_ROWS = 50  # a template shows only among many rows
_SAMPLE = 2_000
_MOST_CHARACTERS = 4_000
_MOST_CANDIDATES = 200
# In shorter prompts a word is most of what is asked; in longer ones SAME finds a changed word
_COPY_WORDS = range(8, 41)
# What more prompts than these share but for a word is a form that rows are written in, and says nothing of copying
_MOST_COPIES = 4
# 20 bands of 4: two texts alike to 0.75 become candidates with probability 1 - (1 - 0.75^4)^20 = 0.9995
_BANDS = (20, 4)

Dedup = Literal["exact", "near", "none"]
Progress = Callable[[int, int], None]


class Alike:
    """Prompts of many rows, and which are the same or alike.

    `prompt[i]` is the number of row i's distinct prompt; `near[p]` lists (other prompt, similarity) pairs with
    similarity of at least ALIKE, `other` coming before p; `copies[p]` the earlier prompts that are p but for a word,
    with the same answer; `cluster[p]` is the smallest prompt number connected with p by either.
    """

    def __init__(self, rows: Sequence[Row], progress: Progress | None = None) -> None:
        numbers: dict[str, int] = {}
        self.prompt = [numbers.setdefault(question_key(row.prompt), len(numbers)) for row in rows]
        self.keys = list(numbers)
        self.near = _neighbours(self.keys, progress)
        self.copies = _copies(self.keys, self._answers(rows))
        self.cluster = list(range(len(self.keys)))
        for number, others in enumerate(self.near):
            for other in (*(other for other, _ in others), *self.copies[number]):
                self._join(number, other)
        self.cluster = [self._root(number) for number in self.cluster]

    def same(self, number: int) -> list[int]:
        """The prompt itself, and the earlier prompts that are nearly the same."""
        return [number, *(other for other, similarity in self.near[number] if similarity >= SAME)]

    def telling(self) -> list[set[int]]:
        """For each prompt all prompts that give it away: itself, nearly the same ones, and copies."""
        found = [{number} for number in range(len(self.keys))]
        for number in range(len(self.keys)):
            for other in (*self.same(number), *self.copies[number]):
                found[number].add(other)
                found[other].add(number)
        return found

    def _answers(self, rows: Sequence[Row]) -> list[set[str]]:
        answers: list[set[str]] = [set() for _ in self.keys]
        for number, row in zip(self.prompt, rows, strict=True):
            answers[number].add(normalise(row.answer))
        return answers

    def _root(self, number: int) -> int:
        while self.cluster[number] != number:
            self.cluster[number] = self.cluster[self.cluster[number]]
            number = self.cluster[number]
        return number

    def _join(self, one: int, other: int) -> None:
        a, b = self._root(one), self._root(other)
        self.cluster[max(a, b)] = min(a, b)


def repeated(
    rows: Sequence[Row], alike: Alike, how: Dedup, gone: Collection[int] = ()
) -> dict[int, Literal["exact", "near"]]:
    """The rows that repeat an earlier one, by number; rows that are `gone` already are passed over.

    A repeat has the same answer (nearly, for "near") to the same prompt (nearly, for "near"); the same prompt
    with another answer is another row.
    """
    kept: dict[int, list[str]] = {}
    found: dict[int, Literal["exact", "near"]] = {}
    if how == "none":
        return found
    for number, row in enumerate(rows):
        if number in gone:
            continue
        prompt, answer = alike.prompt[number], normalise(row.answer)
        if answer in kept.get(prompt, ()):
            found[number] = "exact"
        elif how == "near" and any(
            _same_answer(answer, other) for near in alike.same(prompt) for other in kept.get(near, ())[:50]
        ):
            found[number] = "near"
        else:
            kept.setdefault(prompt, []).append(answer)
    return found


def standing_in(texts: Sequence[str], others: Sequence[str]) -> dict[int, tuple[int, Literal["exactly", "nearly"]]]:
    """Which of many texts also stand, exactly or nearly, among few others: number -> (the other's number, how)."""
    import numpy as np

    keys, texts = [normalise(other) for other in others], [normalise(text) for text in texts]
    exact = {key: number for number, key in reversed(list(enumerate(keys)))}
    template = _template(texts)

    def told_by(text: str) -> Grams:
        return np.setdiff1d(_grams(text), template, assume_unique=True) if len(template) else _grams(text)

    grams = [told_by(key) for key in keys]
    every = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint32)
    found: dict[int, tuple[int, Literal["exactly", "nearly"]]] = {}
    for number, text in enumerate(texts):
        if (same := exact.get(text)) is not None:
            found[number] = (same, "exactly")
            continue
        own = told_by(text)
        if len(own) < _LEAST_GRAMS or np.isin(own, every, assume_unique=True).sum() < SAME * len(own):
            continue  # most texts have too little in common with all of them together
        similarity, other = max((_jaccard(own, one), -n) for n, one in enumerate(grams))
        if similarity >= SAME:
            found[number] = (-other, "nearly")
    return found


def _same_answer(one: str, other: str) -> bool:
    if one == other:
        return True
    # Length alone rules most pairs out: 4-gram sets of texts so different in size cannot overlap by SAME
    if min(len(one), len(other)) < SAME * 0.9 * max(len(one), len(other)):
        return False
    a, b = _grams(one), _grams(other)
    return min(len(a), len(b)) >= _LEAST_GRAMS and _jaccard(a, b) >= SAME


def _neighbours(texts: Sequence[str], progress: Progress | None) -> list[list[tuple[int, float]]]:
    import numpy as np
    from datasketch import MinHash, MinHashLSH

    template = _template(texts)
    index = MinHashLSH(num_perm=_BANDS[0] * _BANDS[1], params=_BANDS)
    blank = MinHash(num_perm=_BANDS[0] * _BANDS[1], seed=1, hashfunc=int)
    grams: list[Grams] = []
    near: list[list[tuple[int, float]]] = []
    for number, text in enumerate(texts):
        own = _grams(text)
        if len(template):
            own = np.setdiff1d(own, template, assume_unique=True)
        grams.append(own)
        found: list[tuple[int, float]] = []
        if len(own) >= _LEAST_GRAMS:
            sketch = blank.copy()
            sketch.update_batch(own.tolist())
            for other in sorted(index.query(sketch))[:_MOST_CANDIDATES]:
                similarity = _jaccard(own, grams[other])
                if similarity >= ALIKE:
                    found.append((other, similarity))
            index.insert(number, sketch, check_duplication=False)
        near.append(found)
        if progress and number % 500 == 0:
            progress(number, len(texts))
    return near


def _copies(texts: Sequence[str], answers: Sequence[set[str]]) -> list[list[int]]:
    """For each text the earlier ones that are it but for a word changed, added, left out or moved, with an answer in
    common."""
    holders: dict[int, list[int]] = {}  # hash of a text, whole or without one of its words -> texts
    for number, text in enumerate(texts):
        words = text.split()
        if len(words) in _COPY_WORDS:
            for form in {hash(text), *(hash(" ".join(words[:i] + words[i + 1 :])) for i in range(len(words)))}:
                holders.setdefault(form, []).append(number)
    found: list[set[int]] = [set() for _ in texts]
    for held in holders.values():
        if 1 < len(held) <= _MOST_COPIES:
            for n, later in enumerate(held):
                found[later].update(other for other in held[:n] if answers[later] & answers[other])
    return [sorted(others) for others in found]


def _template(texts: Sequence[str]) -> Grams:
    import numpy as np

    if len(texts) < _TEMPLATE_ROWS:
        return np.empty(0, np.uint32)
    sample = texts[:: max(1, len(texts) // _SAMPLE)]
    values, counts = np.unique(np.concatenate([_grams(text) for text in sample]), return_counts=True)
    found: Grams = values[counts > _TEMPLATE_SHARE * len(sample)]
    return found


def _grams(text: str) -> Grams:
    """The distinct character 4-grams of a text's beginning, each as a 32-bit hash, sorted."""
    import numpy as np

    codes = np.frombuffer(f" {text[:_MOST_CHARACTERS]} ".encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    if len(codes) < _GRAM:
        return np.unique(codes).astype(np.uint32)
    mixed = np.zeros(len(codes) - _GRAM + 1, np.uint64)
    for offset in range(_GRAM):
        mixed = (mixed ^ codes[offset : len(codes) - _GRAM + 1 + offset]) * np.uint64(0x9E3779B97F4A7C15)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def _jaccard(one: Grams, other: Grams) -> float:
    import numpy as np

    common = len(np.intersect1d(one, other, assume_unique=True))
    union = len(one) + len(other) - common
    return common / union if union else 1.0
