"""Traffic as mergeable sketches: a window holds counts of one version's requests over one minute, hour or day.

Everything in a window is an integer that adds, so merging is associative, commutative and exact: hours and days
are the merges of their minutes, late events change nothing but the counts they belong to, and money is kept in
billionths of a dollar. The one exception is the table of new words, which is bounded (see `Words`).

Latencies fall into logarithmic buckets as in DDSketch (Masson, Rim, Lee 2019), so a percentile read from them is
within `RELATIVE_ERROR` of the true one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries
from monitoring import batches
from registry.profile import FEATURE, FEATURES, Extractor, Profile

SQL = load_queries(Path(__file__).with_suffix(".sql"))

Grain = Literal["minute", "hour", "day"]
GRAINS: Mapping[Grain, timedelta] = {
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
}
_Key = tuple[str, int, Grain, datetime]  # model, version, grain, start
RELATIVE_ERROR = 0.02
_GAMMA = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_MIN_MS, _MAX_MS = 0.01, 1e8
_WORDS = 512
_WORDS_PER_REQUEST = 16
_NANO = 1_000_000_000
_MICRO = 1_000_000
MINUTE_DAYS, _HOUR_DAYS = 8, 400  # how long minutes and hours are kept; days stay

FEEDBACK: Mapping[str, int] = {"rated": 1, "disliked": 2, "corrected": 4}  # bits of feedback.counts

_CHOSEN = ("pinned", "shadow")  # slots that nobody draws

# The last five are sums of a line through the lengths of requests: how many there are, x, y, x x and x y, where x are
# characters and y tokens
LANGUAGES = (
    "requests", "prompt_tokens", "characters", "tokens", "cost_nano_usd", "fit_n", "fit_x", "fit_y", "fit_xx", "fit_xy",
)  # fmt: skip
_LANGUAGE, _CHARACTERS = (list(FEATURE).index(name) for name in ("language", "characters"))

Counts = Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Words:
    """Requests counted by new word, for at most `_WORDS` words (Misra-Gries, merged as in Agarwal et al. 2012,
    "Mergeable Summaries"): a true count lies between the kept one and the kept one plus `error`, and `error` is at
    most the sum of all counts / (_WORDS + 1), in whatever order windows were merged."""

    counts: Mapping[str, int] = field(default_factory=dict)
    error: int = 0

    def __add__(self, other: Words) -> Words:
        total = Counter(self.counts)
        total.update(other.counts)
        error = self.error + other.error
        if len(total) > _WORDS:
            cut = sorted(total.values(), reverse=True)[_WORDS]
            total = Counter({word: n - cut for word, n in total.items() if n > cut})
            error += cut
        return Words(counts=dict(total), error=error)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The sketches of some requests. Tokens, money and time are of all of them, features of answered ones.

    `errors` are answers with a status of 500 or more. `latency_ms`, `ttft_ms` and `cost_micro_usd` map a bucket
    (`bucket`) to a count, of answers with status 200. `features` maps a feature of registry.profile to its histogram,
    by bin.
    `feedback` are the requests that people rated, disliked and corrected (`FEEDBACK`), by the requests' time.
    `languages` maps "place:what" to a sum over answered requests in a language (its place in registry.languages), for
    each what of `LANGUAGES`. `chosen` is the part of all this that nobody drew: copies, and requests that named a
    version or a slot; the rest is a sample of the traffic.
    """

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    engine_us: int = 0
    cost_nano_usd: int = 0
    status: Counts = field(default_factory=dict)
    slots: Mapping[str, int] = field(default_factory=dict)
    latency_ms: Counts = field(default_factory=dict)
    ttft_ms: Counts = field(default_factory=dict)
    cost_micro_usd: Counts = field(default_factory=dict)
    feedback: Mapping[str, int] = field(default_factory=dict)
    languages: Mapping[str, int] = field(default_factory=dict)
    features: Mapping[str, Counts] = field(default_factory=dict)
    new_words: Words = Words()
    chosen: Window | None = None

    @property
    def answered(self) -> int:
        return self.status.get(200, 0)

    @property
    def cost_usd(self) -> float:
        return self.cost_nano_usd / _NANO

    @property
    def engine_seconds(self) -> float:
        return self.engine_us / _MICRO

    def histogram(self, feature: str) -> list[int]:
        """A feature's histogram with all its bins."""
        counts = self.features.get(feature, {})
        return [counts.get(i, 0) for i in range(FEATURE[feature].bins)]

    def __add__(self, other: Window) -> Window:
        return total((self, other))


@dataclass(frozen=True, kw_only=True)
class Closed:
    """What one call of `close` did: events merged, and the versions (model, number) they belong to."""

    events: int = 0
    versions: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One window of a series."""

    version: int
    start: datetime
    window: Window


def bucket(milliseconds: float) -> int:
    """The logarithmic bucket of a duration; what is outside 10 microseconds to a day counts as the nearest."""
    return math.ceil(math.log(min(_MAX_MS, max(_MIN_MS, milliseconds))) / _GAMMA)  # in this order NaN is the least


def bucket_value(index: int) -> float:
    """The duration that is within RELATIVE_ERROR of every one in the bucket, in milliseconds."""
    return 2 * math.exp(_GAMMA * index) / (math.exp(_GAMMA) + 1)


def percentile(counts: Counts, q: float) -> float | None:
    """The q-quantile (0..1) in milliseconds within RELATIVE_ERROR: the ``floor(q * (n - 1))``-th smallest, as
    numpy's method "lower". None for nothing."""
    index = quantile_bucket(counts, q)
    return None if index is None else bucket_value(index)


def quantile_bucket(counts: Counts, q: float) -> int | None:
    """The bucket, or a feature's bin, that holds that smallest one."""
    rank, seen = math.floor(q * (sum(counts.values()) - 1)), 0
    for index in sorted(counts):
        seen += counts[index]
        if seen > rank:
            return index
    return None


# ---------------------------------------------------------------- making and merging


class _Sum:
    """A window being added up."""

    def __init__(self) -> None:
        self.numbers = [0] * 6
        self.maps: tuple[Counter[Any], ...] = tuple(Counter() for _ in _maps(Window()))
        self.features: dict[str, Counter[int]] = {}
        self.words = Words()
        self.chosen: _Sum | None = None

    def add(self, window: Window) -> None:
        for i, number in enumerate(_numbers(window)):
            self.numbers[i] += number
        for mine, counts in zip(self.maps, _maps(window), strict=True):
            mine.update(counts)
        for name, histogram in window.features.items():
            self.features.setdefault(name, Counter()).update(histogram)
        self.words += window.new_words
        if window.chosen is not None:
            self.chosen = self.chosen or _Sum()
            self.chosen.add(window.chosen)

    def window(self) -> Window:
        requests, errors, prompt, completion, engine, cost = self.numbers
        status, slots, latency, ttft, price, feedback, languages = (dict(m) for m in self.maps)
        return Window(
            requests=requests,
            errors=errors,
            prompt_tokens=prompt,
            completion_tokens=completion,
            engine_us=engine,
            cost_nano_usd=cost,
            status=status,
            slots=slots,
            latency_ms=latency,
            ttft_ms=ttft,
            cost_micro_usd=price,
            feedback=feedback,
            languages=languages,
            features={name: dict(counts) for name, counts in self.features.items()},
            new_words=self.words,
            chosen=self.chosen.window() if self.chosen is not None else None,
        )


def _numbers(w: Window) -> tuple[int, ...]:
    return w.requests, w.errors, w.prompt_tokens, w.completion_tokens, w.engine_us, w.cost_nano_usd


def _maps(w: Window) -> tuple[Mapping[Any, int], ...]:
    return w.status, w.slots, w.latency_ms, w.ttft_ms, w.cost_micro_usd, w.feedback, w.languages


def total(windows: Iterable[Window]) -> Window:
    """The merge of any number of windows; none give an empty one."""
    result = _Sum()
    for window in windows:
        result.add(window)
    return result.window()


def of_event(event: Mapping[str, Any], extractor: Extractor | None = None) -> Window:
    """The window of one row of ``request_event``. New words are counted where the row has its text."""
    made = _of_event(event, extractor)
    return replace(made, chosen=replace(made, new_words=Words())) if event["slot"] in _CHOSEN else made


def _of_event(event: Mapping[str, Any], extractor: Extractor | None) -> Window:
    status, answered = int(event["status"]), event["status"] == 200
    features: dict[str, Counts] = {}
    if answered:
        for feature, value in zip(FEATURES, event["features"], strict=False):
            if value is not None and value == value:  # not NaN
                features[feature.name] = {feature.bin(value): 1}
    words = Words()
    if extractor is not None and event.get("messages"):
        found = extractor.new_words(event["messages"])[:_WORDS_PER_REQUEST]
        words = Words(counts=dict.fromkeys(found, 1))
    ttft = event["ttft_ms"]
    return Window(
        requests=1,
        errors=int(status >= 500),
        prompt_tokens=event["prompt_tokens"],
        completion_tokens=event["completion_tokens"],
        engine_us=_scaled(event["engine_seconds"], _MICRO),
        cost_nano_usd=_scaled(event["cost_usd"], _NANO),
        status={status: 1},
        slots={event["slot"]: 1},
        latency_ms={bucket(event["latency_ms"]): 1} if answered else {},
        ttft_ms={bucket(ttft): 1} if answered and ttft is not None else {},
        cost_micro_usd={bucket(_MICRO * event["cost_usd"]): 1} if answered else {},
        languages=_of_language(event) if answered else {},
        features=features,
        new_words=words,
    )


def _of_language(event: Mapping[str, Any]) -> dict[str, int]:
    values = event["features"]
    if len(values) <= _LANGUAGE or not (math.isfinite(values[_LANGUAGE]) and math.isfinite(values[_CHARACTERS])):
        return {}
    prompt, completion = event["prompt_tokens"], event["completion_tokens"]
    characters = min(max(0, int(values[_CHARACTERS])), 2**31)
    figures = (
        1, prompt, characters, prompt + completion, _scaled(event["cost_usd"], _NANO),
        1, characters, prompt, characters**2, characters * prompt,
    )  # fmt: skip
    place = FEATURE["language"].bin(values[_LANGUAGE])
    return {f"{place}:{what}": n for what, n in zip(LANGUAGES, figures, strict=True)}


def _scaled(value: float, unit: int) -> int:
    return round(value * unit) if math.isfinite(value) else 0


def to_json(window: Window) -> dict[str, Any]:
    """What ``traffic_window.sketches`` holds; requests and errors have columns of their own."""
    chosen = window.chosen
    more = {} if chosen is None else {"chosen": {**to_json(chosen), "of": [chosen.requests, chosen.errors]}}
    return {
        **more,
        "format": 1,
        "numbers": list(_numbers(window)[2:]),
        "status": dict(window.status),
        "slots": dict(window.slots),
        "latency_ms": dict(window.latency_ms),
        "ttft_ms": dict(window.ttft_ms),
        "cost_micro_usd": dict(window.cost_micro_usd),
        "feedback": dict(window.feedback),
        "languages": dict(window.languages),
        "features": {name: dict(counts) for name, counts in window.features.items()},
        "new_words": {"counts": dict(window.new_words.counts), "error": window.new_words.error},
    }


def from_row(row: Mapping[str, Any]) -> Window:
    """The inverse of `to_json`, from a row of ``traffic_window``."""
    sketches = row["sketches"]
    chosen = sketches.get("chosen")  # which windows of earlier releases lack
    prompt, completion, engine, cost = sketches["numbers"]
    return Window(
        requests=row["requests"],
        errors=row["errors"],
        prompt_tokens=prompt,
        completion_tokens=completion,
        engine_us=engine,
        cost_nano_usd=cost,
        status=_by_int(sketches["status"]),
        slots=sketches["slots"],
        latency_ms=_by_int(sketches["latency_ms"]),
        ttft_ms=_by_int(sketches["ttft_ms"]),
        cost_micro_usd=_by_int(sketches.get("cost_micro_usd", {})),  # windows of earlier releases lack these three
        feedback=sketches.get("feedback", {}),
        languages=sketches.get("languages", {}),
        features={name: _by_int(counts) for name, counts in sketches["features"].items() if name in FEATURE},
        new_words=Words(**sketches["new_words"]),
        chosen=chosen and from_row({"requests": chosen["of"][0], "errors": chosen["of"][1], "sketches": chosen}),
    )


def _by_int(counts: Mapping[str, int]) -> dict[int, int]:
    return {int(key): n for key, n in counts.items()}


def floor(at: datetime, grain: Grain) -> datetime:
    """The start of the window (UTC) that a time falls into."""
    at = at.astimezone(UTC).replace(second=0, microsecond=0)
    if grain == "minute":
        return at
    return at.replace(minute=0) if grain == "hour" else at.replace(minute=0, hour=0)


# ---------------------------------------------------------------- in the database


def close(conn: Connection, *, rows: int = 10_000, export: bool = False) -> Closed:
    """Merge the events of batches that are in no window yet into their minutes, hours and days; the oldest batches
    with together about `rows` events a call. With `export` they then wait for monitoring.otlp.

    Windows and batches' marks change in this one transaction, and closers wait for each other, so every event is
    counted exactly once however often a batch is replayed, and however late it comes.
    """
    conn.execute(SQL["lock_closing"])
    open_batches = conn.execute(SQL["open_batches"], {"rows": rows}).fetchall()
    if not open_batches:
        return Closed()
    events = batches.events(conn, SQL["events"], open_batches)
    ours = {row["id"] for row in conn.execute(SQL["our_keys"])}
    extractors = _extractors(conn, {(e["model"], e["version"]) for e in events if e["messages"] is not None})
    sums: dict[tuple[str, int, datetime], _Sum] = {}
    keys: dict[tuple[str, int, str, date], Counter[str]] = {}
    for event in events:
        if event["version"] is not None:  # refused before routing: no version's traffic
            key = (event["model"], event["version"], floor(event["at"], "minute"))
            if event["key_id"] not in ours:  # what we ask ourselves is nobody's traffic, but costs as much
                sums.setdefault(key, _Sum()).add(of_event(event, extractors.get(key[:2])))
            if event["key_id"] is not None and event["slot"] != "shadow":  # nobody asked for a copy
                used = keys.setdefault((*key[:2], event["key_id"], event["at"].astimezone(UTC).date()), Counter())
                used.update(
                    requests=1,
                    prompt=event["prompt_tokens"],
                    completion=event["completion_tokens"],
                    cost=_scaled(event["cost_usd"], _NANO),
                )
    changes: dict[_Key, _Sum] = {}
    for (model, version, start), minute in sums.items():
        window = minute.window()
        for grain in GRAINS:
            changes.setdefault((model, version, grain, floor(start, grain)), _Sum()).add(window)
    _merge_into_table(conn, {key: change.window() for key, change in changes.items()})
    with conn.cursor() as cursor:
        cursor.executemany(
            SQL["add_key_usage"],
            [
                {"model": model, "version": version, "key_id": key, "day": day, **keys[model, version, key, day]}
                for model, version, key, day in sorted(keys)
            ],
        )
    conn.execute(SQL["mark_windowed"], {"batches": [batch["id"] for batch in open_batches], "export": export})
    return Closed(events=len(events), versions=frozenset((model, version) for model, version, _ in sums))


def count_feedback(conn: Connection, *, rows: int = 1000) -> int:
    """Bring what feedback says into its requests' windows, and what is said otherwise now; of how many requests.

    Windows and what of feedback is counted change in this one transaction, so each request counts once, by what was
    said last. Feedback makes no window: it waits for its minute's, and counts in what is still kept.
    """
    conn.execute(SQL["lock_closing"])
    found = conn.execute(SQL["uncounted_feedback"], {"rows": rows, "minute_days": MINUTE_DAYS}).fetchall()
    changes: dict[_Key, _Sum] = {}
    for row in found:
        change = {
            name: bool(row["counts"] & bit) - bool(row["counted"] & bit)
            for name, bit in FEEDBACK.items()
            if (row["counts"] ^ row["counted"]) & bit
        }
        for grain in GRAINS:
            key = (row["model"], row["version"], grain, floor(row["request_at"], grain))
            changes.setdefault(key, _Sum()).add(Window(feedback=change))
    there = _there(conn, sorted(changes))
    with conn.cursor() as cursor:
        cursor.executemany(
            SQL["put_window"], [_row(key, window + changes[key].window()) for key, window in there.items()]
        )
        cursor.executemany(SQL["counted_feedback"], found)
    return len(found)


def _extractors(conn: Connection, versions: Iterable[tuple[str, int | None]]) -> dict[tuple[str, int], Extractor]:
    wanted = [(model, number) for model, number in versions if number is not None]
    if not wanted:
        return {}
    found = {}
    for row in conn.execute(SQL["profiles"], {"models": [m for m, _ in wanted], "numbers": [n for _, n in wanted]}):
        with suppress(ValueError):  # one that cannot be read knows no words; judging tells of it
            found[row["model"], row["number"]] = Extractor(Profile.from_json(row["profile"]))
    return found


def _merge_into_table(conn: Connection, changes: Mapping[_Key, Window]) -> None:
    keys = sorted(changes)
    there = _there(conn, keys)
    with conn.cursor() as cursor:
        cursor.executemany(
            SQL["put_window"],
            [_row(key, there[key] + changes[key] if key in there else changes[key]) for key in keys],
        )


def _there(conn: Connection, keys: Sequence[_Key]) -> dict[_Key, Window]:
    """Those of the windows that there are."""
    columns = list(zip(*keys, strict=True)) or [(), (), (), ()]
    return {
        (row["model"], row["version"], row["grain"], row["start"]): from_row(row)
        for row in conn.execute(
            SQL["get_windows"],
            {
                "models": list(columns[0]),
                "versions": list(columns[1]),
                "grains": list(columns[2]),
                "starts": list(columns[3]),
            },
        )
    }


def _row(key: _Key, window: Window) -> dict[str, Any]:
    model, version, grain, start = key
    return {
        "model": model,
        "version": version,
        "grain": grain,
        "start": start,
        "requests": window.requests,
        "errors": window.errors,
        "sketches": Jsonb(to_json(window)),
    }


def read(conn: Connection, model: str, version: int, since: datetime, until: datetime) -> Window:
    """All of a version's traffic from the minute of `since` to the end of the minute of `until`; of long ago, by
    whole hours, then by whole days, as far as minutes and hours are kept."""
    minute_from = floor(since, _kept(since))
    minute_to = max(minute_from, ceil(until, _kept(until)))
    hour_from = min(ceil(minute_from, "hour"), minute_to)
    hour_to = max(floor(minute_to, "hour"), hour_from)
    day_from = min(ceil(hour_from, "day"), hour_to)
    day_to = max(floor(hour_to, "day"), day_from)
    rows = conn.execute(
        SQL["read_windows"],
        {
            "model": model,
            "version": version,
            "minute_from": minute_from,
            "minute_to": minute_to,
            "hour_from": hour_from,
            "hour_to": hour_to,
            "day_from": day_from,
            "day_to": day_to,
        },
    )
    return total(from_row(row) for row in rows)


def series(
    conn: Connection, model: str, versions: Sequence[int], since: datetime, until: datetime, grain: Grain,
    *, features: bool = True,
) -> list[Point]:  # fmt: skip
    """Windows of one grain, for charts, by start; windows without traffic are left out. Without `features` and words
    they are a tenth of the size."""
    rows = conn.execute(
        SQL["series" if features else "series_of_figures"],
        {"model": model, "versions": list(versions), "grain": grain, "since": floor(since, grain), "until": until},
    )
    return [Point(version=row["version"], start=row["start"], window=from_row(row)) for row in rows]


def drop_old(conn: Connection, days: int) -> None:
    """Forget old minutes and hours, the marks of batches merged long ago, and the words that requests had more than so
    many `days` ago: what only one had may be a name."""
    conn.execute(SQL["drop_windows"], {"minute_days": MINUTE_DAYS, "hour_days": _HOUR_DAYS})
    conn.execute(SQL["drop_words"], {"days": days})
    conn.execute(SQL["drop_batches"])


def _kept(at: datetime) -> Grain:
    """The finest grain whose windows of that time are surely still there."""
    age = datetime.now(UTC) - at + GRAINS["hour"]
    if age < timedelta(days=MINUTE_DAYS):
        return "minute"
    return "hour" if age < timedelta(days=_HOUR_DAYS) else "day"


def ceil(at: datetime, grain: Grain) -> datetime:
    """The start of the first window that begins no earlier."""
    start = floor(at, grain)
    return start if start == at else start + GRAINS[grain]
