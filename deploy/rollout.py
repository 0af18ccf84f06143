"""A canary in steps: what its traffic shows -> go on, promote, or take back. Pure; monitoring/canaries.py acts on it.

The test is sequential: it may be looked at after every minute, for as long as one likes, and still takes a version that
is no worse back with a probability of at most ``alpha`` (Ville's inequality). Each thing that can go wrong with a
request (it failed, it was slow, people disliked it) is counted on both sides, minute by minute, and bet on by an
E-variable for two streams of yes or no: Turner, Ly and Gruenwald, "Generic E-variables for exact sequential k-sample
tests that allow for optional stopping", J. Stat. Plan. Inference 230 (2024), with the odds ratio mixed over
a grid (Robbins 1970) and the rate learned from the minutes before. It holds for "no worse" as for "equal": the
E-variable grows with the challenger's rate and falls with the champion's, so that its mean is largest where both are
equal. The mean of the E-values of all that is watched is one again, so no correction for their number is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from registry.rollouts import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LOG_ODDS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # how much worse a challenger may be, as the test bets; equal stakes
_OLD = 1000.0  # requests that the traffic before the canary counts for at most, where the rate is learned


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One thing that can go wrong with a request. The test's word alone takes no version back: the shares must differ
    by more than `tolerance`, since with enough requests any difference shows."""

    name: str
    words: str
    tolerance: float


WATCHED = (
    Watched(name="errors", words="answers with status 500 or more", tolerance=0.002),
    Watched(name="abandoned", words="requests whose clients left before the answer was whole", tolerance=0.01),
    Watched(name="late", words="first tokens later than half of the champion's were before", tolerance=0.02),
    Watched(name="slow", words="answers slower than half of the champion's were before", tolerance=0.02),
    Watched(name="slowest", words="answers slower than 95 % of the champion's were before", tolerance=0.01),
    Watched(name="long", words="answers longer than half of the champion's were before", tolerance=0.02),
    Watched(name="dear", words="answers dearer than half of the champion's were before", tolerance=0.02),
    Watched(name="truncated", words="answers cut off at the token limit", tolerance=0.01),
    Watched(name="empty", words="empty answers", tolerance=0.002),
    Watched(name="disliked", words="rated answers with a score below zero", tolerance=0.02),
)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Of one thing that is watched: by minute, how often it happened and of how many, ``[minutes]`` each; `before` is
    the same of the champion's traffic before the canary, in all."""

    bad: Sequence[int]
    of: Sequence[int]
    champion_bad: Sequence[int]
    champion_of: Sequence[int]
    before: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How one thing stands: the two sides' shares (None without requests) and the evidence that the challenger is
    worse, an E-value: 20 is as rare as 1 in 20 among versions that are not."""

    name: str
    words: str
    share: float | None
    champion_share: float | None
    requests: int
    evidence: float
    worse: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do now, and why, as a sentence."""

    action: Literal["wait", "advance", "promote", "take_back", "stop"]
    reason: str
    evidence: float
    findings: tuple[Finding, ...]


def decide(
    plan: Plan,
    step: int,
    streams: Mapping[str, Stream],
    *,
    requests: int,
    in_step: timedelta,
    alerts: Sequence[str] = (),
) -> Decision:
    """What a canary at a step (from 0) should do. `streams` are since it began, by the names of `WATCHED`; `requests`
    of the challenger and `in_step` are since the step began; `alerts` are open for it and not for the champion."""
    watched = [w for w in WATCHED if w.name in streams and w.name not in plan.ignore]
    paths = {w.name: log_evidence(streams[w.name]) for w in watched}
    overall = _highest_mean(list(paths.values()))
    needed = 1 / plan.alpha
    enough = overall >= math.log(needed)
    findings = tuple(_finding(w, streams[w.name], paths[w.name], enough=enough, needed=needed) for w in watched)

    def say(action: Literal["wait", "advance", "promote", "take_back", "stop"], reason: str) -> Decision:
        return Decision(action=action, reason=reason, evidence=_exp(overall), findings=findings)

    if worse := [f for f in findings if f.worse]:
        first = max(worse, key=lambda f: f.evidence)
        return say(
            "take_back",
            f"it is worse: {_percent(first.share)} {first.words}, the champion's {_percent(first.champion_share)}, of "
            f"{first.requests:,} requests (evidence {_exp(overall):.3g}, needed {needed:g})",
        )
    if alerts:
        return say("take_back", f"an alert is open for it and not for the champion: {alerts[0]}")
    minutes = in_step.total_seconds() / 60
    if requests >= plan.min_requests and minutes >= plan.min_minutes:
        seen = f"{requests:,} requests in {minutes:.0f} minutes and no sign that it is worse"
        if step + 1 < len(plan.steps):
            return say("advance", f"{seen}: from {_percent(plan.steps[step])} to {_percent(plan.steps[step + 1])}")
        return say("promote", f"{seen}: all steps are passed")
    if minutes >= 60 * plan.max_hours:
        return say(
            "stop", f"{requests:,} of {plan.min_requests:,} requests in {plan.max_hours:g} hours: too few to tell"
        )
    return say("wait", f"{requests:,} of {plan.min_requests:,} requests, {minutes:.0f} of {plan.min_minutes:g} minutes")


def log_evidence(stream: Stream) -> NDArray[np.float64]:
    """The logarithm of the E-value after each minute, ``[minutes]``."""
    import numpy as np

    bad, of = np.asarray(stream.bad, np.float64), np.asarray(stream.of, np.float64)
    champion_bad, champion_of = (np.asarray(x, np.float64) for x in (stream.champion_bad, stream.champion_of))
    old_bad, old_of = stream.before
    kept = min(1.0, _OLD / old_of) if old_of else 0.0

    def until_then(counts: NDArray[np.float64], first: float) -> NDArray[np.float64]:
        return first + np.concatenate([[0.0], np.cumsum(counts)[:-1]])

    # Of the minutes before alone: what is bet must not depend on what it is bet on
    rate = until_then(bad + champion_bad, 0.5 + kept * old_bad) / until_then(of + champion_of, 1.0 + kept * old_of)
    logit = np.log(rate) - np.log1p(-rate)
    share = np.divide(of, of + champion_of, out=np.zeros_like(of), where=of + champion_of > 0)
    paths = []
    for odds in _LOG_ODDS:
        worse = _sigmoid(logit + odds * (1 - share))
        usual = _sigmoid(logit - odds * share)
        pooled = share * worse + (1 - share) * usual
        won = bad * np.log(worse / pooled) + (of - bad) * np.log((1 - worse) / (1 - pooled))
        won += champion_bad * np.log(usual / pooled) + (champion_of - champion_bad) * np.log((1 - usual) / (1 - pooled))
        paths.append(np.cumsum(np.where((of > 0) & (champion_of > 0), won, 0.0)))
    return np.asarray(np.logaddexp.reduce(paths, axis=0) - math.log(len(paths)), np.float64)


def _highest_mean(paths: Sequence[NDArray[np.float64]]) -> float:
    """The logarithm of the highest mean that the E-values of all things ever had."""
    import numpy as np

    if not paths or not len(paths[0]):
        return 0.0
    return max(0.0, float((np.logaddexp.reduce(paths, axis=0) - math.log(len(paths))).max()))


def _finding(watched: Watched, stream: Stream, path: NDArray[np.float64], *, enough: bool, needed: float) -> Finding:
    of, champion_of = sum(stream.of), sum(stream.champion_of)
    share = sum(stream.bad) / of if of else None
    usual = sum(stream.champion_bad) / champion_of if champion_of else None
    evidence = _exp(float(path.max())) if len(path) else 1.0
    more = share is not None and usual is not None and share - usual > watched.tolerance
    return Finding(
        name=watched.name, words=watched.words, share=share, champion_share=usual, requests=of, evidence=evidence,
        worse=enough and more and evidence >= needed,
    )  # fmt: skip


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return np.asarray(1 / (1 + np.exp(-x)), np.float64)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.3g} %"
