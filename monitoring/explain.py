"""Verdicts in plain words: what moved, from what to what, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from registry.profile import AXES, FEATURE, TOPICS

if TYPE_CHECKING:
    from monitoring.attribution import Attribution, Cause
    from monitoring.drift import Moved

_MAX_SENTENCES = 4
_MAX_WORDS = 6
# Features that say the same thing in other units: only the first of a group that moved is told.
_GROUPS = (
    ("prompt_tokens", "words", "characters"),
    ("completion_tokens", "answer_characters"),
    tuple(f"embedding_{axis}" for axis in range(1, AXES + 1)),
)


def too_few(model: str, version: int, answered: int, least: int) -> str:
    """Not enough requests to say anything."""
    return (
        f"{model}:{version} answered {answered} requests in this time; a verdict needs {least}. "
        "Wait for more traffic, or look at a longer time with --since."
    )


def no_profile(model: str, version: int) -> str:
    """Nothing to compare with."""
    return (
        f"{model}:{version} has no reference profile that this traffic could be compared with. "
        "Versions made by a pipeline run have one."
    )


def verdict(
    model: str,
    version: int,
    answered: int,
    compared: int,
    moved: Sequence[Moved],
    new_words: Sequence[str],
    *,
    usual: Sequence[Moved] = (),
    keeps_text: bool,
    found: Attribution | None,
) -> str:
    """The explanation of a verdict from enough requests; `found` says what it comes of, if anything `moved`. What is
    `usual` differs from the reference only by the rhythm of the day."""
    if found is None and usual:
        return (
            f"The {answered} requests that {model}:{version} answered are as usual at these hours: of the {compared} "
            f"things measured none has changed. As at the same hours of its first days they differ from what it was "
            f"made from in {_labels(usual)}, which cancels out over a whole day. Nothing to do."
        )
    if found is None:
        return (
            f"The {answered} requests that {model}:{version} answered look like what it was made from: of the "
            f"{compared} things measured none has changed. Nothing to do."
        )
    # What tells of the cause comes first: other answers only follow from other requests
    told = sorted(_without_repeats(moved), key=lambda m: (m.feature.name not in found.features, -m.value / m.threshold))
    sentences = [_sentence(m, new_words, keeps_text=keeps_text) for m in told[:_MAX_SENTENCES]]
    by_hours = [m for m in moved if m.usual_days]
    rest = len(told) - _MAX_SENTENCES
    if rest > 0:
        sentences.append(f"{rest} more changed less")
    return (
        f"Over {answered} requests to {model}:{version}, {len(moved)} of {compared} things measured have changed: "
        + "; ".join(sentences)
        + ". "
        + (f"Compared with the same hours of its first days: {_labels(by_hours)}. " if by_hours else "")
        + (f"As usual at these hours: {_labels(usual)}. " if usual else "")
        + (f"It began about {at(found.since)}. " if found.since else "")
        + advice(model, found.cause, [m.feature.name for m in moved])
    )


def _labels(moved: Sequence[Moved]) -> str:
    told = [m.feature.label for m in _without_repeats(moved)]
    rest = len(told) - _MAX_SENTENCES
    return ", ".join(told[:_MAX_SENTENCES]) + (f" and {rest} more" if rest > 0 else "")


def at(time: datetime) -> str:
    """A time in a sentence, to the minute."""
    time = time.astimezone(UTC)
    return f"{time:%H:%M} UTC on {time.day} {time:%B}"


def _without_repeats(moved: Sequence[Moved]) -> list[Moved]:
    names = {m.feature.name for m in moved}
    hidden = {name for group in _GROUPS for name in [n for n in group if n in names][1:]}
    return [m for m in moved if m.feature.name not in hidden]


def advice(model: str, cause: Cause, moved: Sequence[str]) -> str:
    """What to do about drift, by what it comes of and the names of the features that moved: the end of a verdict's
    explanation."""
    if cause == "input":
        return (
            "People ask for other things than the version was trained on, so going back to an older one would not "
            f"help: send corrections for such requests (POST /v1/feedback) and retrain (`tunesmith retrain {model}`)."
        )
    if cause == "judge":
        return (
            "The requests and the answers are as they were, but people like the answers less than they did, though it "
            "is the same version: look at who scores, such as a judge's model or prompt that changed, or another team, "
            "and leave the version as it is until that is known."
        )
    if any(FEATURE[name].side == "quality" for name in moved if name in FEATURE):
        corrected = "similarity" in moved
        what, which = (
            ("correct the answers more than the evaluation promised", "corrected")
            if corrected
            else ("like the answers less than those given before", "disliked")
        )
        return (
            f"The requests are the same, but people {what}: look at {which} requests, then retrain "
            f"(`tunesmith retrain {model}`) or go back (`tunesmith rollback {model}`)."
        )
    return (
        "The requests are the same, only the answers changed, so look at the version and its engine: compare it with "
        f"the one before (`tunesmith versions {model}`), and go back if that one was better "
        f"(`tunesmith rollback {model}`)."
    )


def _sentence(m: Moved, new_words: Sequence[str], *, keeps_text: bool) -> str:
    name, feature = m.feature.name, m.feature
    if name in _MIXES:
        return f"{_percent(_elsewhere(m))} of {_MIXES[name]} than before"
    if name == "language":
        live, known = (_languages(feature.names, counts) for counts in (m.now, m.before))
        return f"requests are in other languages ({live} now, {known} before)"
    if name == "json_shape":
        return _shape(*(counts[TOPICS] / sum(counts) for counts in (m.before, m.now)))
    if name.startswith("embedding_"):
        return f"the words of {_percent(_elsewhere(m))} of requests mean other things than before"
    if name == "unseen_word_share":
        return _unseen(m, new_words, keeps_text=keeps_text)
    if name in _LENGTHS:
        return _length(m, *_LENGTHS[name])
    before, now = feature.mean(m.before), feature.mean(m.now)
    if name in _SHARES:
        told = _SHARES[name].format(now=_percent(now))
        if _percent(now) == _percent(before):
            return f"{told} on average, as before, but another share of {_percent(_elsewhere(m))} of them"
        return f"{told}, {_percent(before)} before"
    return _OTHERS[name](before, now)


def _unseen(m: Moved, new_words: Sequence[str], *, keeps_text: bool) -> str:
    which = ""
    if new_words:
        which = f" ({', '.join(f'`{word}`' for word in new_words[:_MAX_WORDS])})"
    elif not keeps_text:
        which = " (which ones is not known, since monitoring.keep_text is off)"
    return (
        f"{_percent(m.feature.mean(m.now))} of the words in requests are words the training data never had{which}, "
        f"{_percent(m.feature.mean(m.before))} before"
    )


def _shape(before: float, now: float) -> str:
    """By the shares of what is no JSON object."""
    if _percent(before) == _percent(now):
        return "JSON answers have other fields"
    return f"{_percent(now)} of answers are no JSON object, {_percent(before)} before"


def _length(m: Moved, what: str, unit: str) -> str:
    before, now = m.feature.median(m.before), m.feature.median(m.now)
    figures = f"median {now:.0f} {unit}, {before:.0f} before"
    if before > 0 and now >= 1.15 * before:
        return f"{what} are {now / before:.1f} times as long ({figures})"
    if now > 0 and before >= 1.15 * now:
        return f"{what} are {before / now:.1f} times shorter ({figures})"
    return f"{_percent(_elsewhere(m))} of {what} are of another length than before ({figures})"


def _elsewhere(m: Moved) -> float:
    """The share that would have to be another for all to be as before."""
    now, before = sum(m.now), sum(m.before)
    return sum(abs(a / now - b / before) for a, b in zip(m.now, m.before, strict=True)) / 2


def _languages(names: Sequence[str], counts: Sequence[int]) -> str:
    """The two most frequent ones with their shares."""
    most = sorted(range(len(counts)), key=lambda place: -counts[place])[:2]
    shares = [(names[place], counts[place] / sum(counts)) for place in most if counts[place]]
    return " and ".join(f"{name} {_percent(share)}" for name, share in shares)


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.1 or share == 0 else f"{share * 100:.1f} %"


def _sureness(before: float, now: float) -> str:
    side = "less" if now < before else "more"
    chances = f"it gives a word it writes {_percent(math.exp(now))}, {_percent(math.exp(before))} before"
    return f"the model is {side} sure of its answers ({chances})"


_LENGTHS = {
    "prompt_tokens": ("prompts", "tokens"),
    "words": ("prompts", "words"),
    "characters": ("prompts", "characters"),
    "completion_tokens": ("answers", "tokens"),
    "answer_characters": ("answers", "characters"),
}
_MIXES = {"topic": "requests are about other topics", "answer_mix": "answers are of other kinds"}
_SHARES = {
    "digit_share": "digits make up {now} of requests",
    "punctuation_share": "punctuation makes up {now} of requests",
    "upper_share": "capital letters make up {now} of requests",
    "non_ascii_share": "letters and signs beyond plain English ones make up {now} of requests",
    "repetition": "{now} of what answers say is repetition",
    "refusal": "{now} of answers refuse",
    "truncated": "{now} of answers are cut off at the token limit",
    "empty": "{now} of answers are empty",
}
_OTHERS: dict[str, Callable[[float, float], str]] = {
    "chars_per_token": lambda before, now: f"a token covers {now:.1f} characters, {before:.1f} before",
    "mean_logprob": _sureness,
    "score": lambda before, now: f"people score its answers {now:.2f} on average (from -1 to 1), {before:.2f} before",
    "similarity": lambda before, now: (
        f"answers are {_percent(now)} like what people corrected them to, and were, when it was judged, "
        f"{_percent(before)} like what was expected"
    ),
}
