"""What one request wants of a decoder: how long, how random, where to stop; and its text as it grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_UNFINISHED = "\ufffd"  # what a decoder shows for a character whose bytes have not all come


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`temperature` 0 is greedy. `seed` makes a random answer repeatable. `top_logprobs`: how many alternatives to
    report beside each token."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from fp32 logits of shape [vocabulary]: tempered softmax, then nucleus sampling (Holtzman et al.
    2020), the smallest set of most likely tokens whose probabilities sum to at least top_p."""
    import torch

    if sampling.temperature < 1e-5:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        ordered[1:][ordered.cumsum(-1)[:-1] >= sampling.top_p] = 0
        return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


class Text:
    """Tokens into text, piece by piece; the pieces together are the text, whatever bytes the tokens split.

    Held back until more is known: the bytes of an unfinished character, and what may be the beginning of a stop
    string. A stop string ends the text before itself.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._start = self._clean = 0  # the window that is decoded; its end when it last ended with a whole character
        self._shown = 0  # characters of the window's text that stand in `_text`
        self._text = ""
        self._taken = 0
        self._done = False

    def push(self, token: int) -> bool:
        """Add a token; True when a stop string has come."""
        self._tokens.append(token)
        whole = self._decode()
        stable = whole.rstrip(_UNFINISHED)
        self._show(stable[self._shown :])
        self._shown = max(self._shown, len(stable))
        if len(stable) == len(whole) and not self._done:
            self._start, self._clean = self._clean, len(self._tokens)
            self._shown = len(self._decode())
        return self._done

    def close(self) -> bool:
        """No more tokens come: nothing is held back any more. True when a stop string was found after all."""
        if not self._done:
            self._show(self._decode()[self._shown :])
        stopped, self._done = self._done, True
        return stopped

    @property
    def value(self) -> str:
        """All text so far, what is held back included."""
        return self._text

    def take(self) -> str:
        """What can be shown since the last take."""
        end = len(self._text) if self._done else len(self._text) - self._held()
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _decode(self) -> str:
        window = self._tokens[self._start :]
        return str(
            self._tokenizer.decode(window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if window
            else ""
        )

    def _show(self, piece: str) -> None:
        begin = max(0, len(self._text) - max(map(len, self._stop), default=0) + 1)
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, begin)) >= 0]
        if found:
            self._text, self._done = self._text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._text))
        return next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(self._text[-n:]) for stop in self._stop)), 0
        )
