"""Do canaries in steps keep what they promise? Versions that are no worse are taken back in at most 5 % of rollouts,
and ones that are 10 % worse are caught within REQUESTS of their own, a number fixed before the run: 1,000 simulated
rollouts for each line.

    python tests/benchmarks/canaries.py [--short]

Traffic is drawn, looked at every few minutes, and decided on by the code that decides on real one. The bounds are
binomial, at 99 %. The program fails when a promise is broken. Two lines, of users who differ and stay with their
version, are promised nothing: there requests of a user are not independent, which the test takes them to be. Then the
plan that a rollout has where the file says nothing: it promises as much of versions that are no worse; how many of
those that are worse it takes back, and promotes, hangs on the traffic of its minutes, and is printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from deploy.rollout import WATCHED, Stream, decide
from registry.rollouts import Plan

RUNS = 1000
REQUESTS = 4000  # of the challenger's, within which it must be caught
CAUGHT = 0.9  # of the rollouts
PLAN = Plan(steps=(0.01, 0.05, 0.25, 0.5), min_requests=1000, min_minutes=10, max_hours=5)
PER_MINUTE = 600
LOOK = 200  # the challenger's requests between two looks

Counts = dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """How a version answers: latency and length are lognormal, the rest are shares of the requests."""

    latency: float = 1.0
    length: float = 1.0
    price: float = 1.0  # of a token
    errors: float = 0.01
    abandoned: float = 0.01
    first: float = 1.0  # until the first token, of which there is one in each answer
    truncated: float = 0.02
    empty: float = 0.002
    rated: float = 0.2
    disliked: float = 0.1

    def minute(self, random: np.random.Generator, habits: NDArray[np.float64]) -> Counts:
        """What is watched of requests whose senders have these habits: what their latency is multiplied with, and the
        odds of a dislike."""
        n = len(habits)
        slow = self.latency * habits * random.lognormal(0, 0.5, n)
        long = self.length * random.lognormal(0, 0.6, n)
        rated = random.random(n) < self.rated
        odds = self.disliked / (1 - self.disliked) * habits**2
        disliked = rated & (random.random(n) < odds / (1 + odds))
        return {
            "errors": (random.binomial(n, self.errors), n),
            "abandoned": (random.binomial(n, self.abandoned), n),
            "late": (int((self.first * habits * random.lognormal(0, 0.5, n) > 1).sum()), n),
            "slow": (int((slow > 1).sum()), n),
            "slowest": (int((slow > SLOWEST).sum()), n),
            "long": (int((long > 1).sum()), n),
            "dear": (int((self.price * long > 1).sum()), n),
            "truncated": (random.binomial(n, self.truncated), n),
            "empty": (random.binomial(n, self.empty), n),
            "disliked": (int(disliked.sum()), int(rated.sum())),
        }


SLOWEST = float(stats.lognorm(s=0.5).ppf(0.95))
USUAL = Traffic()


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    challenger: Traffic
    users: int | None = None  # who differ, and stay with a version; None: each request is somebody else's
    worse: bool = True


CASES = (
    Case(name="equal", challenger=USUAL, worse=False),
    Case(name="better: 10 % faster, half the errors", challenger=Traffic(latency=0.9, errors=0.005), worse=False),
    Case(name="latency 10 % longer", challenger=Traffic(latency=1.1)),
    Case(name="answers, and their cost, 10 % longer", challenger=Traffic(length=1.1)),
    Case(name="tokens 10 % dearer", challenger=Traffic(price=1.1)),
    Case(name="first tokens 10 % later", challenger=Traffic(first=1.1)),
    Case(name="errors on 10 % more of the requests", challenger=Traffic(errors=0.11)),
    Case(name="10 % more of the clients leave", challenger=Traffic(abandoned=0.11)),
    Case(name="disliked on 10 % more of what is rated", challenger=Traffic(disliked=0.2)),
    Case(name="equal, 20,000 users who differ", challenger=USUAL, users=20_000, worse=False),
    Case(name="equal, 200 users who differ", challenger=USUAL, users=200, worse=False),
)


@dataclass(kw_only=True)
class Sides:
    """Both sides' counts so far, minute by minute."""

    challenger: list[Counts] = field(default_factory=list)
    champion: list[Counts] = field(default_factory=list)

    def streams(self, before: Mapping[str, tuple[int, int]]) -> dict[str, Stream]:
        return {
            w.name: Stream(
                bad=[minute[w.name][0] for minute in self.challenger],
                of=[minute[w.name][1] for minute in self.challenger],
                champion_bad=[minute[w.name][0] for minute in self.champion],
                champion_of=[minute[w.name][1] for minute in self.champion],
                before=before[w.name],
            )
            for w in WATCHED
        }


def roll_out(case: Case, random: np.random.Generator, plan: Plan) -> tuple[str, int]:
    """How one canary ended, and after how many of the challenger's requests."""
    users = case.users
    habits = np.exp(random.normal(0, 0.3, users)) if users else np.ones(1)
    places = random.random(users) if users else None  # below the share a user gets the challenger
    before = USUAL.minute(random, habits[random.integers(len(habits), size=2000)])
    sides, seen = Sides(), 0
    for step, share in enumerate(plan.steps):
        here = minutes = since = 0
        while True:
            who = random.integers(len(habits), size=random.poisson(PER_MINUTE))
            new = (places[who] if places is not None else random.random(len(who))) < share
            sides.challenger.append(case.challenger.minute(random, habits[who[new]]))
            sides.champion.append(USUAL.minute(random, habits[who[~new]]))
            here, since, minutes, seen = here + new.sum(), since + new.sum(), minutes + 1, seen + new.sum()
            passed = here >= plan.min_requests and minutes >= plan.min_minutes
            if since < LOOK and not passed and minutes < 60 * plan.max_hours:
                continue
            since = 0
            found = decide(plan, step, sides.streams(before), requests=here, in_step=timedelta(minutes=minutes))
            if found.action == "advance":
                break
            if found.action != "wait":
                return found.action, seen
    raise AssertionError("a canary neither ended nor went on")


def main() -> None:
    runs = 60 if "--short" in sys.argv else RUNS
    broken = simulate(runs, PLAN, CASES, fixed=True)
    broken += simulate(runs, Plan(), [case for case in CASES if case.users is None], fixed=False)
    if broken:
        sys.exit(f"Broken: {'; '.join(broken)}.")


def simulate(runs: int, plan: Plan, cases: Sequence[Case], *, fixed: bool) -> list[str]:
    """Prints a line a case; the names of those whose promise was broken. `fixed`: whether REQUESTS is promised."""
    broken = []
    steps = ", ".join(f"{100 * share:g} %" for share in plan.steps)
    print(f"{runs:,} rollouts a line; steps {steps} of {PER_MINUTE} requests a minute, {plan.min_requests:,} of the "
          f"challenger's a step, {plan.min_minutes:g} minutes at least, alpha {plan.alpha:g}")  # fmt: skip
    for number, case in enumerate(cases):
        random, begun = np.random.default_rng(number), time.monotonic()
        ends = [roll_out(case, random, plan) for _ in range(runs)]
        taken = [requests for action, requests in ends if action == "take_back"]
        if case.worse and not fixed:
            kept = True
            said = f"taken back: {len(taken)}, promoted: {sum(action == 'promote' for action, _ in ends)}"
        elif case.worse:
            caught = sum(requests <= REQUESTS for requests in taken)
            bound = int(stats.binom.ppf(0.01, runs, CAUGHT))
            kept = caught >= bound
            middle = f"half by {int(np.median(taken)):,}" if taken else "none"
            said = f"caught within {REQUESTS:,} requests: {caught} (at least {bound}), {middle}"
        else:
            bound = int(stats.binom.ppf(0.99, runs, plan.alpha))
            kept = len(taken) <= bound or case.users is not None
            said = f"taken back: {len(taken)} " + ("(no promise)" if case.users else f"(at most {bound})")
        broken += [] if kept else [case.name]
        print(f"{case.name:44} {said}{'' if kept else '  BROKEN'}   {time.monotonic() - begun:.0f} s", flush=True)
    return broken


if __name__ == "__main__":
    main()
