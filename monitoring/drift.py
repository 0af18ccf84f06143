"""Has a version's traffic moved away from what the version was made from? From windows, without any raw row but for
examples of what did.

Each feature's live histogram is compared with the version's frozen profile. A feature has moved when its distance
is larger than chance makes it, at the sizes of both, in one of a hundred quiet comparisons of all features
together (Bonferroni), and larger than what matters at all (registry.profile.Feature.matters): a million requests
make any trifle certain. Over less than a day, what has moved is compared with the version's usual hours too, so that
the rhythm of the day is no drift (monitoring/rhythm.py has the rule). The watcher looks often, at overlapping spans, so
a single look promises less than the five in a hundred that a quiet day may be wrong.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from psycopg.types.json import Jsonb

from infra.db import Connection, load_queries, one
from infra.errors import NotFound
from monitoring import attribution, explain, rhythm, statistics, windows
from monitoring.statistics import Statistic
from registry.profile import FEATURE, FEATURES, Feature, Profile

SQL = load_queries(Path(__file__).with_suffix(".sql"))

ALPHA = 0.01
RESAMPLES = 4000
_OF_DAYS, _FEWER = 0.01, 500  # the level, of one feature, at which days and hours are let in, and resamples for it
MIN_REQUESTS = 100
_MIN_ROWS = 30  # on either side; below that, a histogram says nothing
_MIN_FEEDBACK = 0.2  # share of answers with a correction; below, corrections are a choice of the bad ones
_EARLIER = 10_000  # scores that those of a time are compared with, at most

Verdict = Literal["drift", "stable", "too_few"]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One feature compared. `value` and `threshold` are in the statistic's unit; `before` and `now` are the two
    histograms. With `usual_days`, `before` is of the same hours of so many days, and `from_reference` is how far it has
    moved against the reference."""

    feature: Feature
    statistic: Statistic
    value: float
    threshold: float
    before: tuple[int, ...]
    now: tuple[int, ...]
    usual_days: int = 0
    from_reference: float | None = None

    @property
    def drifted(self) -> bool:
        return self.value > self.threshold

    @property
    def usual(self) -> bool:
        """Whether it differs from the reference as it usually does at these hours."""
        return bool(self.usual_days) and not self.drifted

    def to_json(self) -> dict[str, Any]:
        """The contract's object."""
        return {
            "name": self.feature.name,
            "side": self.feature.side,
            "statistic": self.statistic,
            "value": round(self.value, 4),
            "threshold": round(self.threshold, 4),
            "drifted": self.drifted,
            "usual": {"days": self.usual_days, "from_reference": round(self.from_reference, 4)}
            if self.from_reference is not None
            else None,
            "also": {name: round(value, 4) for name, value in self.also().items()},
        }

    def also(self) -> dict[str, float]:
        """The same in measures that people know from elsewhere, by which nothing is decided here: PSI, and in the
        feature's unit Wasserstein's distance, or of categories and flags the p-value of a chi-square test."""
        a, b = statistics.array(self.before), statistics.array(self.now)
        found = {"psi": float(statistics.psi(a, b))}
        if self.feature.kind in ("category", "flag"):
            return found | {"chi_square_p": statistics.chi_square_p(a, b)}
        return found | {"wasserstein": float(statistics.wasserstein(a, b, self.feature.centres))}


def compare(
    profile: Profile,
    live: Mapping[str, Sequence[int]],
    *,
    effects: Mapping[str, float] | None = None,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Moved]:
    """Every feature that both sides have enough of, in the order of FEATURES; `live` holds histograms by name, and
    `effects` by how much bursts of like requests make them more uncertain (statistics.design_effect)."""
    pairs = [
        (feature, profile.histograms[feature.name], tuple(live[feature.name]))
        for feature in FEATURES
        if feature.name in profile.histograms
        and sum(profile.histograms[feature.name]) >= _MIN_ROWS
        and sum(live.get(feature.name, ())) >= _MIN_ROWS
    ]
    return [
        _compare(
            feature,
            before,
            now,
            tail=alpha / len(pairs),
            resamples=resamples,
            seed=seed + i,
            effect=(effects or {}).get(feature.name, 1.0),
        )
        for i, (feature, before, now) in enumerate(pairs)
    ]


def _compare(
    feature: Feature, before: Sequence[float], now: Sequence[float], *, tail: float, resamples: int, seed: int,
    effect: float, effect_before: float = 1.0, matters: float | None = None, only_whether: bool = False,
) -> Moved:  # fmt: skip
    """`matters` is the feature's own unless given; `only_whether` it moved is wanted, and not a threshold that is
    right where it did not."""
    # Bins that are empty on both sides change no statistic, and drawing them costs as much as any other.
    bins = [i for i in range(feature.bins) if before[i] or now[i]]
    a, b = statistics.array([before[i] for i in bins]), statistics.array([now[i] for i in bins])
    a /= effect_before
    least = feature.matters if matters is None else matters
    name, distance = statistics.of(feature, bins)
    value, noise = float(distance(a, b)), 0.0
    if value > least or not only_whether:
        n, m, span = float(a.sum()), float(b.sum()) / effect, feature.centres[bins[-1]] - feature.centres[bins[0]]
        noise = statistics.noise_at_most(name, n, m, bins=len(bins), span=span, tail=tail)
    if noise > least:
        noise = statistics.noise(a, b, distance, tail=tail, resamples=resamples, seed=seed, effect=effect)
    return Moved(
        feature=feature,
        statistic=name,
        value=value,
        threshold=max(least, noise),
        before=tuple(round(n) for n in before),
        now=tuple(round(n) for n in now),
    )


def beside_usual(
    compared: Sequence[Moved],
    days: rhythm.Rhythm,
    *,
    effects: Mapping[str, float] | None = None,
    alpha: float = ALPHA,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Moved]:
    """The features as `compare` gave them, those that moved judged by the version's usual hours where it has some that
    can tell: the rule of monitoring/rhythm.py. What people say is not of an hour, and stays as it is."""
    return [
        _by_usual(
            m, days, tail=alpha / len(compared), resamples=resamples, seed=seed + i,
            effect=(effects or {}).get(m.feature.name, 1.0),
        )
        if m.drifted and m.feature.side != "quality"
        else m
        for i, m in enumerate(compared)
    ]  # fmt: skip


def _by_usual(m: Moved, days: rhythm.Rhythm, *, tail: float, resamples: int, seed: int, effect: float) -> Moved:
    def columns(hours: rhythm.Hours) -> list[list[int]]:
        return [hour.histogram(m.feature.name) for hour in hours]

    stricter = {"tail": _OF_DAYS, "resamples": _FEWER}

    def moved(before: Sequence[float], now: Sequence[float], **by: Any) -> bool:
        return _compare(m.feature, before, now, seed=seed, only_whether=True, **by).drifted

    def day_moved(hours: Sequence[Sequence[int]], **by: Any) -> bool:
        return moved(m.before, _added(hours), effect=statistics.design_effect(statistics.array(hours)), **by)

    if day_moved(columns(days.today), tail=tail, resamples=resamples):
        return m
    usual: list[list[float]] = []
    for day in map(columns, days.earlier):
        same = _added([[part * n for n in hour] for part, hour in zip(days.parts, day, strict=True)])
        if (
            sum(same) >= _MIN_ROWS
            and not day_moved(day, **stricter)
            and not (usual and moved(_added(usual), same, effect=effect, effect_before=effect, **stricter))
        ):
            usual.append(same)
    hours = _added(usual)
    if len(usual) < rhythm.LEAST_DAYS or not moved(m.before, hours, effect=effect, matters=0.0, **stricter):
        return m
    beside = _compare(
        m.feature, hours, m.now, tail=tail, resamples=resamples, seed=seed, effect=effect, effect_before=effect
    )
    return replace(beside, usual_days=len(usual), from_reference=m.value)


def _added(histograms: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*histograms, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What a version served in a time and what people said of it (`quality`, as histograms), what both are compared
    with, and the model's settings."""

    window: windows.Window
    quality: Mapping[str, Sequence[int]]
    reference: Profile
    settings: Mapping[str, Any]


def look(conn: Connection, model: str, version: int, since: datetime, until: datetime) -> Looked:
    """All that `judge` begins with. Raises NotFound when there is no such version."""
    row = conn.execute(SQL["version"], {"model": model, "version": version}).fetchone()
    if row is None:
        raise NotFound(f"There is no version {model}:{version}.", hint=f"See `tunesmith versions {model}`.")
    return Looked(
        window=windows.read(conn, model, version, since, until),
        quality=quality(conn, model, version, since, until),
        reference=reference(conn, Profile.from_json(row["profile"]), model, since),
        settings=row["settings"].get("monitoring", {}),
    )


def judge(
    conn: Connection, model: str, version: int, since: datetime, until: datetime,
    *, before: Mapping[str, Any] | None = None, looked: Looked | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The contract's `drift` object for what one version served between two times (to the minute), and to what a drift
    is attributed (`attribution`; null without one). A verdict shortly `before`, by which the same moved, saves finding
    that out again, and what was `looked` at, reading it.

    `too_few` when it answered fewer requests than the model's ``monitoring.min_requests`` (100 by default).
    Raises NotFound when there is no such version.
    """
    looked = looked or look(conn, model, version, since, until)
    least, window, given = int(looked.settings.get("min_requests", MIN_REQUESTS)), looked.window, looked.quality
    live = {feature.name: window.histogram(feature.name) for feature in FEATURES} | {"score": given["score"]}
    if sum(given["similarity"]) >= _MIN_FEEDBACK * window.answered:
        live["similarity"] = given["similarity"]
    compared: list[Moved] = []
    found: attribution.Attribution | None = None
    if window.answered < least:
        verdict: Verdict = "too_few"
        text = explain.too_few(model, version, window.answered, least)
    elif not (compared := _compared(conn, looked.reference, live, model, version, since, until, least)):
        verdict, text = "too_few", explain.no_profile(model, version)
    else:
        moved, usual = [m for m in compared if m.drifted], [m for m in compared if m.usual]
        verdict = "drift" if moved else "stable"
        if moved:
            found = _known(before, moved) or _attribute(conn, model, version, moved, given["score"], since, until)
        text = explain.verdict(
            model, version, window.answered, len(compared), moved, _new_words(window), usual=usual,
            keeps_text=bool(looked.settings.get("keep_text", False)), found=found,
        )  # fmt: skip
    return {
        "model": model,
        "version": version,
        "since": since,
        "until": until,
        "verdict": verdict,
        "features": [m.to_json() for m in compared],
        "explanation": text,
        "attribution": found and found.to_json(),
    }


def _compared(
    conn: Connection, profile: Profile, live: Mapping[str, Sequence[int]], model: str, version: int,
    since: datetime, until: datetime, least: int,
) -> list[Moved]:  # fmt: skip
    effects = _effects(conn, model, version, since, until)
    compared = compare(profile, live, effects=effects)
    if until - since >= rhythm.DAY or not any(m.drifted for m in compared):
        return compared
    days = rhythm.read(conn, model, version, since, until, least=least)
    return beside_usual(compared, days, effects=effects)


def _effects(conn: Connection, model: str, version: int, since: datetime, until: datetime) -> dict[str, float]:
    """Of each feature that windows hold, by how much bursts of like requests make its histogram more uncertain."""
    span = until - since
    grain: windows.Grain = "minute" if span <= timedelta(hours=3) else "hour" if span <= timedelta(days=14) else "day"
    points = windows.series(conn, model, [version], since, until, grain)
    return {
        feature.name: statistics.design_effect(
            statistics.array([p.window.histogram(feature.name) for p in points]).reshape(len(points), feature.bins)
        )
        for feature in FEATURES
        if feature.side != "quality"
    }


def _known(before: Mapping[str, Any] | None, moved: Sequence[Moved]) -> attribution.Attribution | None:
    """What an earlier verdict was attributed to, if the same features had moved."""
    if before is None or not before.get("attribution"):
        return None
    if {f["name"] for f in before["features"] if f["drifted"]} != {m.feature.name for m in moved}:
        return None
    return attribution.Attribution.from_json(before["attribution"])


def _attribute(
    conn: Connection, model: str, version: int, moved: Sequence[Moved], scores: Sequence[int],
    since: datetime, until: datetime,
) -> attribution.Attribution:  # fmt: skip
    was_liked = False
    if [m.feature.name for m in moved] == ["score"]:
        earlier = Profile(histograms={"score": tuple(attribution.earlier_scores(conn, model, version, since))})
        was_liked = any(m.drifted for m in compare(earlier, {"score": scores}))
    cause = attribution.cause_of(moved, was_liked=was_liked)
    return attribution.explain(conn, model, version, moved, cause, since, until)


def quality(conn: Connection, model: str, version: int, since: datetime, until: datetime) -> dict[str, list[int]]:
    """Histograms of what people said of a version's answers of a time: their scores, and how like their corrections
    the answers were."""
    edges = {name: list(FEATURE[name].edges) for name in ("similarity", "score")}
    row = one(conn, SQL["feedback"], {"model": model, "version": version, "since": since, "until": until, **edges})
    return {name: statistics.dense(row[name], FEATURE[name].bins) for name in edges}


def reference(conn: Connection, profile: Profile, model: str, since: datetime) -> Profile:
    """A version's profile, and what it cannot know since nobody had used it: the newest scores that were given, before
    a time, to the model's answers, of whatever version."""
    score = FEATURE["score"]
    row = one(
        conn, SQL["earlier_scores"], {"model": model, "since": since, "edges": list(score.edges), "most": _EARLIER}
    )
    if row["score"] is None:
        return profile
    return replace(
        profile, histograms={**profile.histograms, "score": tuple(statistics.dense(row["score"], score.bins))}
    )


def _new_words(window: windows.Window) -> list[str]:
    """New words by how many requests had them, at least three: what one person wrote once names nobody here."""
    counts = window.new_words.counts
    return sorted((w for w in counts if counts[w] >= 3), key=lambda w: (-counts[w], w))


def versions_with_traffic(conn: Connection, model: str, since: datetime, until: datetime) -> list[int]:
    """The versions that served anything on the days of the span, by number."""
    rows = conn.execute(
        SQL["versions_with_traffic"],
        {"model": model, "day_from": windows.floor(since, "day"), "until": until},
    )
    return [row["version"] for row in rows]


def keep(conn: Connection, body: Mapping[str, Any]) -> uuid.UUID:
    """Store a verdict; returns its id."""
    identifier = uuid.uuid4()
    conn.execute(
        SQL["put_verdict"],
        {
            "id": identifier,
            **{name: body[name] for name in ("model", "version", "since", "until", "verdict")},
            "body": Jsonb({**body, "since": _text(body["since"]), "until": _text(body["until"])}),
            "ratios": _ratios(body["features"]),
        },
    )
    return identifier


def ratio(feature: Mapping[str, Any]) -> float | None:
    """How far beyond its threshold a verdict's feature was, 1 at it; None where it was not compared."""
    value, threshold = feature.get("value"), feature.get("threshold")
    if value is None or threshold is None or not math.isfinite(value):
        return None
    return float(value / threshold) if threshold > 0 else math.inf if value > 0 else 0.0


def _ratios(features: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """In FEATURES' order."""
    found = {f["name"]: ratio(f) for f in features}
    return [found.get(feature.name) for feature in FEATURES]


def last(conn: Connection, model: str, version: int) -> Mapping[str, Any] | None:
    """The newest stored verdict: id, at, verdict, body."""
    return conn.execute(SQL["last_verdict"], {"model": model, "version": version}).fetchone()


def drop_old(conn: Connection, days: int) -> None:
    """Forget verdicts older than `days`, except those that asked for a retraining."""
    conn.execute(SQL["drop_verdicts"], {"days": days})


def _text(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
