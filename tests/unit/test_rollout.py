"""Canaries in steps, decided: what counts as evidence, and what follows from it."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from datetime import timedelta

import numpy as np
import pytest

from deploy.rollout import WATCHED, Decision, Stream, decide, log_evidence
from infra.errors import UsageError
from registry.rollouts import WATCHED as WATCHED_NAMES
from registry.rollouts import Plan

PLAN = Plan(steps=(0.1, 0.5, 1.0), min_requests=100, min_minutes=10, max_hours=1)


def constant(minutes: int, bad: int, of: int, champion_bad: int, champion_of: int) -> Stream:
    return Stream(
        bad=[bad] * minutes, of=[of] * minutes, champion_bad=[champion_bad] * minutes,
        champion_of=[champion_of] * minutes, before=(champion_bad * 100, champion_of * 100),
    )  # fmt: skip


def asked(streams: dict[str, Stream], *, step: int = 0, requests: int = 100, minutes: float = 10,
          alerts: tuple[str, ...] = ()) -> Decision:  # fmt: skip
    return decide(PLAN, step, streams, requests=requests, in_step=timedelta(minutes=minutes), alerts=alerts)


def chances(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize("before", [(0, 0), (5, 100), (90, 100)])
@pytest.mark.parametrize(("worse", "usual"), [(0.1, 0.1), (0.5, 0.5), (0.02, 0.02), (0.3, 0.4), (0.0, 0.9), (0.9, 0.9)])
def test_the_mean_of_the_evidence_is_at_most_one_for_a_version_that_is_no_worse(
    worse: float, usual: float, before: tuple[int, int]
) -> None:
    """By going through all outcomes of three minutes of unequal traffic: what makes it a bet that cannot be won."""
    sizes = [(2, 3), (1, 4), (3, 1)]
    mean = 0.0
    for outcome in itertools.product(*(range(n + 1) for pair in sizes for n in pair)):
        bad, champion_bad = outcome[::2], outcome[1::2]
        chance = 1.0
        for (n, m), b, c in zip(sizes, bad, champion_bad, strict=True):
            chance *= chances(n, worse)[b] * chances(m, usual)[c]
        stream = Stream(
            bad=bad, of=[n for n, _ in sizes], champion_bad=champion_bad, champion_of=[m for _, m in sizes],
            before=before,
        )  # fmt: skip
        mean += chance * math.exp(log_evidence(stream)[-1])
    assert mean <= 1 + 1e-12
    if worse == usual and worse > 0:
        assert mean > 0.5  # and it is a bet


def test_evidence_grows_with_the_difference_and_not_without() -> None:
    same = log_evidence(constant(200, 1, 10, 9, 90))
    little, much = (log_evidence(constant(200, bad, 10, 9, 90)) for bad in (2, 5))
    assert same.max() < math.log(3)
    assert math.log(20) < little[-1] < much[-1]
    assert log_evidence(constant(200, 0, 10, 9, 90))[-1] < 0
    assert log_evidence(constant(50, 10, 10, 0, 0))[-1] == pytest.approx(0)  # nobody to compare with
    assert len(log_evidence(Stream(bad=[], of=[], champion_bad=[], champion_of=[]))) == 0


def test_a_calm_canary_waits_advances_and_is_promoted() -> None:
    calm = {"errors": constant(10, 0, 10, 0, 90)}
    assert asked(calm, requests=99).action == "wait"
    assert asked(calm, minutes=9.9).action == "wait"
    assert [asked(calm, step=step).action for step in range(3)] == ["advance", "advance", "promote"]
    assert "from 10 % to 50 %" in asked(calm).reason
    stopped = asked(calm, requests=99, minutes=60)
    assert (stopped.action, "99 of 100 requests in 1 hours: too few" in stopped.reason) == ("stop", True)
    assert asked({}, step=2).action == "promote"


def test_what_is_worse_is_taken_back_and_said() -> None:
    found = asked({"errors": constant(30, 2, 10, 1, 90), "slow": constant(30, 5, 10, 45, 90)}, requests=0, minutes=0)
    assert found.action == "take_back"
    assert found.reason.startswith(
        "it is worse: 20 % answers with status 500 or more, the champion's 1.11 %, of 300 requests (evidence "
    )
    assert [(f.name, f.worse) for f in found.findings] == [("errors", True), ("slow", False)]
    assert asked({"errors": constant(30, 1, 90, 2, 10)}).action == "advance"  # better is not worse


def test_what_is_ignored_takes_nobody_back() -> None:
    assert [w.name for w in WATCHED] == list(WATCHED_NAMES)
    streams = {"long": constant(60, 9, 10, 45, 90), "errors": constant(60, 0, 10, 0, 90)}
    plan = Plan(**{**asdict(PLAN), "ignore": ("long",)})
    for chosen, action in ((PLAN, "take_back"), (plan, "advance")):
        decision = decide(chosen, 0, streams, requests=600, in_step=timedelta(minutes=60))
        assert decision.action == action
    assert [finding.name for finding in decision.findings] == ["errors"]
    streams["errors"] = constant(60, 2, 10, 0, 90)
    assert decide(plan, 0, streams, requests=600, in_step=timedelta(minutes=60)).action == "take_back"
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(UsageError, match="does not watch 'length'"):
        Plan(ignore=("length",))


def test_a_difference_that_does_not_matter_takes_nobody_back() -> None:
    tolerated = {"slow": constant(2000, 515, 1000, 500, 1000)}
    found = asked(tolerated)
    assert found.evidence > 20
    assert found.action == "advance"
    assert not found.findings[0].worse


def test_an_alert_of_the_challengers_own_takes_it_back() -> None:
    found = asked({}, alerts=("drift: its answers are longer",))
    assert (found.action, found.reason.endswith("drift: its answers are longer")) == ("take_back", True)


def test_equal_versions_are_rarely_taken_back_however_often_one_looks() -> None:
    random = np.random.default_rng(7)
    usual = {"errors": 0.01, "abandoned": 0.02, "slowest": 0.05, "truncated": 0.02, "empty": 0.01, "disliked": 0.1}
    rates = {w.name: usual.get(w.name, 0.5) for w in WATCHED}
    taken = 0
    for _ in range(150):
        streams = {}
        for name, rate in rates.items():
            of, champion_of = np.full(120, 5), np.full(120, 20)
            streams[name] = Stream(
                bad=random.binomial(of, rate).tolist(), of=of.tolist(),
                champion_bad=random.binomial(champion_of, rate).tolist(), champion_of=champion_of.tolist(),
                before=(round(1000 * rate), 1000),
            )  # fmt: skip
        taken += asked(streams).action == "take_back"
    assert taken <= 15  # of a Binomial(150, 0.05) more is as rare as 1 in 180


@pytest.mark.parametrize(
    "wrong",
    [{"steps": ()}, {"steps": (0.5, 0.1)}, {"steps": (0.0, 0.5)}, {"steps": (0.5, 1.1)}, {"min_requests": 0},
     {"min_minutes": 61, "max_hours": 1}, {"alpha": 0.0}, {"alpha": 1.0}, {"min_minutes": math.nan}],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Plan.from_json(wrong)


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert Plan.from_json({}) == Plan()
