"""A version's reference profile, and the one feature extractor used for data, gateway and drift alike.

Bins are fixed and do not depend on data, so that histograms of any two periods, versions or machines merge by
adding and compare bin by bin. Values and edges are rounded to 32-bit floats before they are binned: an event's
features come back from PostgreSQL's ``real[]`` into the very bins they were counted in here.

A profile is finite and says how large it is (the sums of its histograms), so that whoever compares can take its
noise into account. It holds counts and common words only, no rows.
"""

from __future__ import annotations

import math
import re
import statistics
import struct
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import orjson

from registry import languages

Side = Literal["input", "output", "quality"]
Kind = Literal["number", "share", "flag", "category"]
Messages = Sequence[Mapping[str, Any]]
Places = Mapping[str, Sequence[float]]  # of words, along axes of their embeddings
Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]

TOPICS = 32
AXES = 4  # of the base's embeddings (registry/embeddings.py)
VOCABULARY = 2000
_SCAN_CHARACTERS = 16_384  # words and character classes are read from the start of very long texts only
_MIN_REQUESTS = 2  # a word is known when at least this many training inputs have it
_UNKNOWN = float("nan")
_FAR = 1000.0  # standard deviations
_GROUP_CHARACTERS = 40  # of what a bin is called, and of answers that are called by all of it


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _log_edges(low: float, high: float, per_doubling: int) -> tuple[float, ...]:
    steps = round(math.log2(high / low) * per_doubling)
    return tuple(_float32(low * 2 ** (i / per_doubling)) for i in range(steps + 1))


def _linear_edges(low: float, high: float, step: float) -> tuple[float, ...]:
    return tuple(_float32(low + i * step) for i in range(round((high - low) / step) + 1))


_COUNT = _log_edges(1, 2**17, 4)  # counts: four bins a doubling, so bin centres are within 10 %
_LENGTH = _log_edges(1, 2**20, 4)
# Shares: exactly nothing has a bin of its own, then fine steps near nothing, then two hundredths.
_SHARE = tuple(_float32(e) for e in (1e-6, 0.0025, 0.005, 0.01)) + _linear_edges(0.02, 1.0, 0.02)
_FLAG = (0.5,)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing that is measured of a request. Bin i holds the values with i edges at or below them, so there
    are ``len(edges) + 1`` bins and the outer two are open.

    `label` completes a sentence about the requests or answers. `matters` is the smallest move that is worth
    telling anybody, however certain it is: in the units of the statistic its kind is compared by
    (monitoring/drift.py). `worse` says that only moves in that direction count; `names` are those of categories that
    have some.
    """

    name: str
    side: Side
    kind: Kind
    edges: tuple[float, ...]
    label: str
    matters: float = 0.1
    worse: Literal["up", "down"] | None = None
    names: tuple[str, ...] = ()

    @property
    def bins(self) -> int:
        return len(self.edges) + 1

    def bin(self, value: float) -> int:
        """The bin of a value that is not NaN."""
        return bisect_right(self.edges, value)

    @cached_property
    def centres(self) -> tuple[float, ...]:
        """A value that stands for each bin: an open end's edge, else the middle (geometric for lengths)."""
        inner = [
            math.sqrt(a * b) if self.kind == "number" and a > 0 else (a + b) / 2
            for a, b in zip(self.edges, self.edges[1:], strict=False)
        ]
        if self.kind == "flag":
            return 0.0, 1.0
        if self.kind == "category":
            return tuple(float(i) for i in range(self.bins))
        low = 0.0 if self.edges[0] > 0 else self.edges[0]
        return (low, *inner, self.edges[-1])

    def mean(self, histogram: Sequence[int]) -> float:
        """Mean from a histogram, within half a bin; NaN for an empty one."""
        total = sum(histogram)
        return sum(c * n for c, n in zip(self.centres, histogram, strict=True)) / total if total else _UNKNOWN

    def median(self, histogram: Sequence[int]) -> float:
        """The centre of the bin that holds the middle value; NaN for an empty histogram."""
        half, seen = sum(histogram) / 2, 0
        for centre, count in zip(self.centres, histogram, strict=True):
            seen += count
            if count and seen >= half:
                return centre
        return _UNKNOWN


FEATURES: tuple[Feature, ...] = (
    Feature(name="prompt_tokens", side="input", kind="number", edges=_COUNT, label="prompt length in tokens"),
    Feature(name="characters", side="input", kind="number", edges=_LENGTH, label="prompt length in characters"),
    Feature(
        name="chars_per_token",
        side="input",
        kind="number",
        edges=_log_edges(0.25, 16, 8),
        label="characters per token",
    ),
    Feature(name="words", side="input", kind="number", edges=_COUNT, label="words in a prompt"),
    Feature(name="digit_share", side="input", kind="share", edges=_SHARE, label="share of digits"),
    Feature(name="punctuation_share", side="input", kind="share", edges=_SHARE, label="share of punctuation"),
    Feature(name="upper_share", side="input", kind="share", edges=_SHARE, label="share of capital letters"),
    Feature(name="non_ascii_share", side="input", kind="share", edges=_SHARE, label="share of non-ASCII characters"),
    Feature(
        name="unseen_word_share",
        side="input",
        kind="share",
        edges=_SHARE,
        label="share of words the training data never had",
        matters=0.08,
        worse="up",
    ),
    Feature(
        name="topic",
        side="input",
        kind="category",
        edges=tuple(i + 0.5 for i in range(TOPICS)),
        label="the mix of topics",
        matters=0.15,
    ),
    Feature(name="completion_tokens", side="output", kind="number", edges=_COUNT, label="answer length in tokens"),
    Feature(name="answer_characters", side="output", kind="number", edges=_LENGTH, label="answer length in characters"),
    Feature(
        name="repetition", side="output", kind="share", edges=_SHARE, label="share of repeated word triples in answers"
    ),
    Feature(
        name="mean_logprob",
        side="output",
        kind="number",
        edges=_linear_edges(-6.0, 0.0, 0.05),
        label="mean log-probability of the answer's tokens (how sure the model is)",
    ),
    Feature(name="refusal", side="output", kind="flag", edges=_FLAG, label="answers that refuse", matters=0.05),
    Feature(
        name="truncated",
        side="output",
        kind="flag",
        edges=_FLAG,
        label="answers cut off at the token limit",
        matters=0.1,
    ),
    Feature(name="empty", side="output", kind="flag", edges=_FLAG, label="empty answers", matters=0.05),
    Feature(
        name="score",
        side="quality",
        kind="number",
        edges=_linear_edges(-1.0, 1.0, 0.1),
        label="feedback score",
        matters=0.1,
        worse="down",
    ),
    Feature(
        name="similarity",
        side="quality",
        kind="share",
        edges=_SHARE,
        label="similarity of answers to corrections",
        matters=0.05,
        worse="down",
    ),
    # From here on in the order in which they came: events hold values by place
    Feature(
        name="language",
        side="input",
        kind="category",
        edges=tuple(i + 0.5 for i in range(languages.PLACES - 1)),
        label="the language of requests",
        names=languages.NAMES + ("another",) * (languages.PLACES - len(languages.NAMES)),
    ),
    Feature(
        name="answer_mix",
        side="output",
        kind="category",
        edges=tuple(i + 0.5 for i in range(TOPICS)),
        label="the mix of answers",
        matters=0.25,  # the reference is of test rows, which may be another mix than traffic's
    ),
    Feature(
        name="json_shape",
        side="output",
        kind="category",
        edges=tuple(i + 0.5 for i in range(TOPICS)),
        label="the shape of JSON answers",
        matters=0.05,
    ),
    *(
        Feature(
            name=f"embedding_{axis}",
            side="input",
            kind="number",
            edges=_linear_edges(-4.0, 4.0, 0.25),
            label=f"what words mean (axis {axis} of the base's embeddings)",
        )
        for axis in range(1, AXES + 1)
    ),
)
FEATURE: Mapping[str, Feature] = {f.name: f for f in FEATURES}
_INPUTS = tuple(f for f in FEATURES if f.side == "input")
_OUTPUTS = tuple(f for f in FEATURES if f.side == "output")
_INPUT_PLACES = tuple(place for place, f in enumerate(FEATURES) if f.side == "input")
_OUTPUT_PLACES = tuple(place for place, f in enumerate(FEATURES) if f.side == "output")
_LANGUAGE = {name: float(place) for place, name in enumerate(languages.NAMES)}

_WORD = re.compile(r"[^\W\d_]{2,40}")
_REFUSAL = re.compile(
    r"\b(i['’]?m sorry|i am sorry|i can(?:no|['’])t|i(?: a|['’])m (?:not able|unable)|i won['’]t|as an ai\b|"
    r"as a language model|(?:cannot|can['’]t|unable to) (?:help|assist|comply|fulfil|answer))",
    re.IGNORECASE,
)
_DIGITS = b"0123456789"
_UPPER = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PUNCTUATION = bytes(c for c in range(33, 127) if not chr(c).isalnum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model answered. `mean_logprob` is over the completion's tokens, None where it is not known."""

    text: str
    completion_tokens: int
    finish_reason: str | None = None
    mean_logprob: float | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The frozen reference of one version: a histogram for each feature that was measured (its sum is the number
    of rows behind it), the common words of the training inputs with the share of inputs that have them, and of those
    words the `places` along the AXES of the base's embeddings, in standard deviations of training inputs around their
    mean (none without a base). `groups` says of the bins of topics and answers, which are many words' each, what most
    of the rows in a bin have that fell there more than once: a word, or a whole short answer such as a label."""

    histograms: Mapping[str, tuple[int, ...]]
    vocabulary: Mapping[str, float] = field(default_factory=dict)
    places: Places = field(default_factory=dict)
    groups: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def group(self, feature: Feature, index: int) -> str:
        """What a bin of a category is called."""
        if feature.names:
            return feature.names[index]
        return self.groups.get(feature.name, {}).get(index, f"group {index + 1}")

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "histograms": {name: list(counts) for name, counts in self.histograms.items()},
            "vocabulary": dict(self.vocabulary),
            "places": {word: list(place) for word, place in self.places.items()},
            "groups": {name: {str(n): text for n, text in bins.items()} for name, bins in self.groups.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Profile:
        """The profile of a bundle or of the ``version`` table. Features that this program does not know, or that
        had other bins, are left out; of a version without a profile (``{}``, such as an imported one) the profile is
        empty. Raises ValueError for another format, and for what is no profile."""
        if not value:
            return cls(histograms={})
        try:
            if value.get("format") != 1:
                raise ValueError(f"a profile of format {value.get('format')!r} is not known to this program")
            histograms = {
                name: tuple(int(n) for n in counts)
                for name, counts in value["histograms"].items()
                if name in FEATURE and len(counts) == FEATURE[name].bins
            }
            vocabulary = {str(w): float(s) for w, s in value["vocabulary"].items()}
            places = {  # earlier releases had none; an import may bring what no 32-bit float holds
                str(w): tuple(max(-_FAR, min(_FAR, float(x))) for x in place)
                for w, place in value.get("places", {}).items()
            }
            if any(len(place) != AXES for place in places.values()):
                places = {}
            groups = {
                str(name): {int(n): str(text)[:_GROUP_CHARACTERS] for n, text in bins.items()}
                for name, bins in value.get("groups", {}).items()
            }
        except (LookupError, TypeError, AttributeError, OverflowError) as error:  # as an import may bring
            raise ValueError(f"it is not a profile: {type(error).__name__}: {error}") from error
        return cls(histograms=histograms, vocabulary=vocabulary, places=places, groups=groups)


class Extractor:
    """Features of one request against one version's profile. Deterministic, without I/O, microseconds a request;
    safe to share between threads."""

    def __init__(self, profile: Profile) -> None:
        self._known = frozenset(profile.vocabulary)
        self._places = profile.places

    def features(self, messages: Messages, answer: Answer, prompt_tokens: int) -> list[float]:
        """One float for each of FEATURES, in their order; NaN where it is not known (quality comes later, with
        feedback). `messages` are the request's, a trailing assistant message is not read."""
        text = input_text(messages)
        found = words(text)
        unseen = sum(word not in self._known for word in found) if self._known else 0
        values = [_UNKNOWN] * len(FEATURES)
        measured = _input_features(text, found, unseen, prompt_tokens, self._places)
        for place, value in zip(_INPUT_PLACES, measured, strict=True):
            values[place] = value
        for place, value in zip(_OUTPUT_PLACES, _output_features(answer), strict=True):
            values[place] = value
        return _as_float32(values)

    def new_words(self, messages: Messages) -> list[str]:
        """The request's distinct words that the profile does not know, in their order; none without a vocabulary."""
        if not self._known:
            return []
        return [word for word in dict.fromkeys(words(input_text(messages))) if word not in self._known]


def build(
    inputs: Iterable[tuple[Messages, int]],
    answers: Iterable[tuple[Messages, Answer, int]] = (),
    similarities: Iterable[float] = (),
    embed: Embed | None = None,
) -> Profile:
    """The profile of a version: `inputs` are the training requests with their prompt tokens, `answers` the
    version's own answers to evaluation rows, `similarities` those answers' similarity to what was expected
    (chrF / 100, 0 to 1), the level that corrections are later compared with. `embed` places words along AXES axes.

    A training input is judged by the words of all other inputs, never by its own (leave one out): otherwise fresh
    requests of the same kind would seem to bring new words.
    """
    texts = [(input_text(messages), tokens) for messages, tokens in inputs]
    rows = [(text, words(text), tokens) for text, tokens in texts]
    requests: Counter[str] = Counter()
    for _, found, _ in rows:
        requests.update(set(found))
    ranked = sorted((w for w, n in requests.items() if n >= _MIN_REQUESTS), key=lambda w: (-requests[w], w))
    vocabulary = {word: round(requests[word] / len(rows), 6) for word in ranked[:VOCABULARY]}
    of_others = {word for word in vocabulary if requests[word] > _MIN_REQUESTS}
    places = _places(embed, vocabulary, [[w for w in found if w in of_others] for _, found, _ in rows])
    places_of_others = {word: place for word, place in places.items() if word in of_others}
    counts = {f.name: [0] * f.bins for f in FEATURES}
    called: dict[str, Counter[str]] = {"topic": Counter(), "answer_mix": Counter()}
    for text, found, tokens in rows:
        unseen = sum(w not in of_others for w in found)
        _count(counts, _INPUTS, _as_float32(_input_features(text, found, unseen, tokens, places_of_others)))
        called["topic"].update(_longest(found))
    for _, answer, _ in answers:
        _count(counts, _OUTPUTS, _as_float32(_output_features(answer)))
        text = " ".join(answer.text.split())
        called["answer_mix"].update([text] if 0 < len(text) <= _GROUP_CHARACTERS else _longest(words(text)))
    for similarity in similarities:
        _count(counts, (FEATURE["similarity"],), _as_float32([similarity]))
    return Profile(
        histograms={n: tuple(c) for n, c in counts.items() if any(c)}, vocabulary=vocabulary, places=places,
        groups={name: _groups(texts) for name, texts in called.items()},
    )  # fmt: skip


def _groups(texts: Counter[str]) -> dict[int, str]:
    """The commonest text of each bin, of those that more than one row has."""
    found: dict[int, str] = {}
    for text, n in sorted(texts.items(), key=lambda item: (-item[1], item[0])):
        if n >= _MIN_REQUESTS:
            found.setdefault(int(_topic(words(text))), text)
    return found


def _longest(found: Sequence[str]) -> list[str]:
    return [max(found, key=len)] if found else []


def _places(embed: Embed | None, vocabulary: Iterable[str], inputs: Iterable[Sequence[str]]) -> Places:
    """Where words lie along each axis, in standard deviations of inputs from their mean; none where all lie alike."""
    known = list(vocabulary)
    if embed is None or not known:
        return {}
    raw = dict(zip(known, embed(known), strict=True))
    axes = list(zip(*(_mean_place(found, raw) for found in inputs if found), strict=True))
    spread = [(statistics.fmean(axis), statistics.pstdev(axis)) for axis in axes]
    if not spread or not all(sd for _, sd in spread):
        return {}
    return {
        word: tuple(round((x - mean) / sd, 3) for x, (mean, sd) in zip(place, spread, strict=True))
        for word, place in raw.items()
    }


def _mean_place(found: Iterable[str], places: Places) -> Sequence[float]:
    """That of a text: the mean over those of its words that have one; NaN without any."""
    known = [place for word in found if (place := places.get(word)) is not None]
    return [sum(axis) / len(known) for axis in zip(*known, strict=True)] if known else [_UNKNOWN] * AXES


def input_text(messages: Messages) -> str:
    """What was asked: the messages' texts without the system's and without a trailing answer."""
    asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    return "\n".join(text_of(m.get("content")) for m in asked if m.get("role") not in ("system", "developer"))


def words(text: str) -> list[str]:
    """Runs of two to forty letters in lower case; names such as ``read_csv2`` fall into their parts."""
    return _WORD.findall(text[:_SCAN_CHARACTERS].lower())


def text_of(content: object) -> str:
    """The text of a message's content, which may be in parts (OpenAI's); pictures and the like are left out."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(str(p.get("text") or "") for p in content if isinstance(p, Mapping))
    return ""


def _count(counts: Mapping[str, list[int]], features: Sequence[Feature], values: Sequence[float]) -> None:
    for feature, value in zip(features, values, strict=True):
        if value == value:  # not NaN
            counts[feature.name][feature.bin(value)] += 1


def _as_float32(values: list[float]) -> list[float]:
    layout = f"{len(values)}f"
    return list(struct.unpack(layout, struct.pack(layout, *values)))


def _input_features(text: str, found: list[str], unseen: int, prompt_tokens: int, places: Places) -> list[float]:
    seen = text[:_SCAN_CHARACTERS]
    ascii_only = seen.encode("ascii", "ignore")
    size = max(1, len(seen))
    return [
        float(prompt_tokens),
        float(len(text)),
        len(text) / prompt_tokens if prompt_tokens > 0 else _UNKNOWN,
        float(len(found)),
        (len(ascii_only) - len(ascii_only.translate(None, _DIGITS))) / size,
        (len(ascii_only) - len(ascii_only.translate(None, _PUNCTUATION))) / size,
        (len(ascii_only) - len(ascii_only.translate(None, _UPPER))) / size,
        (len(seen) - len(ascii_only)) / size,
        unseen / len(found) if found else 0.0,
        _topic(found),
        _LANGUAGE[languages.guess(seen)],
        *_mean_place(found, places),
    ]


def _topic(found: list[str]) -> float:
    """A coarse topic: the bucket of the longest word, which in most languages carries the subject; needs no
    vocabulary, so training data and traffic are bucketed without a bias. Of short answers, such as labels, it tells
    which they are."""
    longest = _longest(found)
    return float(zlib.crc32(longest[0].encode()) % TOPICS) if longest else float(TOPICS)


def _output_features(answer: Answer) -> list[float]:
    found = words(answer.text)
    triples = list(zip(found, found[1:], found[2:], strict=False))
    return [
        float(answer.completion_tokens),
        float(len(answer.text)),
        1 - len(set(triples)) / len(triples) if triples else 0.0,
        _UNKNOWN if answer.mean_logprob is None else min(0.0, answer.mean_logprob),
        float(_REFUSAL.search(answer.text, 0, 300) is not None),
        float(answer.finish_reason == "length"),
        float(not answer.text.strip() and answer.finish_reason not in ("tool_calls", "function_call")),
        _topic(found),
        _json_shape(answer.text),
    ]


def _json_shape(text: str) -> float:
    """Which fields a JSON object has, as one of TOPICS buckets; TOPICS for what is no object. So answers that lose or
    rename a field move it, and those that are cut off, without a schema, which could be made to take for ever."""
    if not text.lstrip().startswith("{"):
        return float(TOPICS)
    try:
        names = "\n".join(sorted(orjson.loads(text)))
    except orjson.JSONDecodeError:
        return float(TOPICS)
    return float(zlib.crc32(names.encode(errors="surrogatepass")) % TOPICS)
