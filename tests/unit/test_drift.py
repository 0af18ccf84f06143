"""Distances equal scipy's; quiet traffic is quiet; another world is found and named."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
import traffic
from scipy import stats
from scipy.spatial.distance import jensenshannon

from monitoring import drift, explain, statistics
from monitoring.attribution import Attribution, Cause
from registry.profile import AXES, FEATURE, FEATURES, Answer, Extractor, build


def attributed(cause: Cause) -> Attribution:
    return Attribution(cause=cause, features=[], since=datetime(2026, 1, 2, 3, 4, tzinfo=UTC), requests=[])


def drifted(moved: list[drift.Moved]) -> set[str]:
    return {m.feature.name for m in moved if m.drifted}


@pytest.mark.parametrize("seed", range(5))
def test_distances_equal_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.multinomial(400, [0.05] * 20), random.multinomial(150, random.dirichlet([1.0] * 20))
    left, right = np.repeat(np.arange(20), a), np.repeat(np.arange(20), b)
    x, y = statistics.array(a), statistics.array(b)
    assert float(statistics.ks(x, y)) == pytest.approx(stats.ks_2samp(left, right).statistic, abs=1e-12)
    # up: the traffic's values are larger, so its cumulative shares lie below the reference's
    up = stats.ks_2samp(left, right, alternative="greater").statistic
    assert float(statistics.ks(x, y, "up")) == pytest.approx(up, abs=1e-12)
    down = stats.ks_2samp(left, right, alternative="less").statistic
    assert float(statistics.ks(x, y, "down")) == pytest.approx(down, abs=1e-12)
    assert float(statistics.js(x, y)) == pytest.approx(float(jensenshannon(a, b, base=2)), abs=1e-12)
    centres = tuple(float(i) for i in range(20))
    assert float(statistics.mean_difference(x, y, centres, "up")) == pytest.approx(right.mean() - left.mean())


@pytest.mark.parametrize("seed", range(5))
def test_measures_that_people_know_equal_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.multinomial(400, random.dirichlet([1.0] * 20)), random.multinomial(150, [0.05] * 20)
    x, y = statistics.array(a), statistics.array(b)
    centres = np.sort(random.lognormal(2, 1, 20))
    expected = stats.wasserstein_distance(centres, centres, a, b)
    assert float(statistics.wasserstein(x, y, tuple(centres))) == pytest.approx(expected, rel=1e-9)
    used = (a + b) > 0
    tested = stats.chi2_contingency([a[used], b[used]], correction=False)
    assert statistics.chi_square_p(x, y) == pytest.approx(tested.pvalue, rel=1e-6)
    p, q = (a + 1) / (a + 1).sum(), (b + 1) / (b + 1).sum()  # no empty bins: Jeffreys' divergence
    jeffreys = stats.entropy(p, q) + stats.entropy(q, p)
    assert float(statistics.psi(statistics.array(a + 1), statistics.array(b + 1))) == pytest.approx(jeffreys)
    assert float(statistics.psi(x, 7 * x)) == pytest.approx(0, abs=1e-12)


def test_wasserstein_from_bins_is_as_near_to_the_raw_values_own_as_said() -> None:
    random = np.random.default_rng(0)
    feature = FEATURE["characters"]
    left, right = random.lognormal(4, 1, 500), random.lognormal(4.5, 1, 300)
    a, b = ([feature.bin(v) for v in side] for side in (left, right))
    raw = stats.wasserstein_distance(left, right)
    counts = [statistics.array(np.bincount(side, minlength=feature.bins)) for side in (a, b)]
    binned = float(statistics.wasserstein(counts[0], counts[1], feature.centres))
    error = sum(
        float(np.mean([abs(v - feature.centres[n]) for v, n in zip(values, bins, strict=True)]))
        for values, bins in ((left, a), (right, b))
    )
    assert abs(binned - raw) <= error
    assert binned == pytest.approx(raw, rel=0.1)


def test_binned_ks_is_at_most_the_raw_values_own() -> None:
    random = np.random.default_rng(0)
    feature = FEATURE["characters"]
    left, right = random.lognormal(4, 1, 500), random.lognormal(4.2, 1, 300)
    a = np.bincount([feature.bin(v) for v in left], minlength=feature.bins)
    b = np.bincount([feature.bin(v) for v in right], minlength=feature.bins)
    raw = stats.ks_2samp(left, right).statistic
    binned = float(statistics.ks(statistics.array(a), statistics.array(b)))
    assert raw - 0.05 <= binned <= raw + 1e-12


def test_noise_is_what_two_samples_of_one_source_show() -> None:
    """The threshold at 5 % is exceeded by about 5 % of fresh pairs from the same source."""
    random = np.random.default_rng(1)
    shares = random.dirichlet([1.0] * 12)
    a, b = statistics.array(random.multinomial(300, shares)), statistics.array(random.multinomial(120, shares))
    threshold = statistics.noise(a, b, statistics.ks, tail=0.05, resamples=2000, seed=0)
    fresh = statistics.ks(
        random.multinomial(300, shares, 2000).astype(float), random.multinomial(120, shares, 2000).astype(float)
    )
    assert 0.02 < float((fresh > threshold).mean()) < 0.08
    again = statistics.noise(a, b, statistics.ks, tail=0.05, resamples=2000, seed=0)
    assert again == threshold, "the same windows give the same verdict"


@pytest.mark.parametrize("name", ["words", "topic", "unseen_word_share", "refusal", "score"])
def test_noise_is_never_more_than_its_bound(name: str) -> None:
    feature, random = FEATURE[name], np.random.default_rng(4)
    for n, m in ((60, 40), (900, 200), (5000, 3000)):
        for _ in range(3):
            shares = random.dirichlet([0.5] * feature.bins)
            a, b = (statistics.array(random.multinomial(size, shares)) for size in (n, m))
            used = [i for i in range(feature.bins) if a[i] or b[i]]
            statistic, distance = statistics.of(feature, used)
            drawn = statistics.noise(a[used], b[used], distance, tail=0.001, resamples=4000, seed=0)
            span = feature.centres[used[-1]] - feature.centres[used[0]]
            bound = statistics.noise_at_most(statistic, n, m, bins=len(used), span=span, tail=0.001)
            assert drawn <= bound <= 6 * drawn + 0.01


def test_the_story_of_the_demo_on_real_text() -> None:
    old, new = (traffic.shuffled(world, 3) for world in traffic.worlds())
    first = traffic.profile(old[:900], old[900:1060])
    assert drifted(drift.compare(first, traffic.histograms(first, old[1060:1260]))) == set()

    foreign = drift.compare(first, traffic.histograms(first, new[:200]))
    assert {"unseen_word_share", "punctuation_share", "words"} <= drifted(foreign)
    day = drift.compare(first, traffic.histograms(first, old[1060:1260] + new[:200]))
    assert "unseen_word_share" in drifted(day), "half a day of it is enough"

    second = traffic.profile(new[:200] + old[:200], new[200:260] + old[900:960])
    mixed = old[1300:1400] + new[300:400]
    assert drifted(drift.compare(second, traffic.histograms(second, mixed))) == set()
    assert drifted(drift.compare(second, traffic.histograms(second, old[:100] + new[:100]))) == set(), (
        "the very rows it was trained on are no drift"
    )

    text = explain.verdict("m", 1, 200, len(foreign), [m for m in foreign if m.drifted], ["axis"], keeps_text=True,
                           found=attributed("input"))  # fmt: skip
    assert "of the words in requests are words the training data never had" in text
    assert "`axis`" in text
    assert "tunesmith retrain m" in text
    assert "It began about 03:04 UTC on 2 January." in text
    print(text)


def quiet_days(days: int, *, resamples: int) -> int:
    """Days on which any of three looks at growing traffic of the training's own kind says drift."""
    old, _ = traffic.worlds()
    alarms = 0
    for day in range(days):
        rows = traffic.shuffled(old, day)
        reference = traffic.profile(rows[:600], rows[600:760])
        alarms += any(
            drifted(drift.compare(reference, traffic.histograms(reference, rows[760 : 760 + n]), resamples=resamples))
            for n in (100, 200, 400)
        )
    return alarms


def test_quiet_days_are_quiet() -> None:
    assert quiet_days(40, resamples=1000) <= stats.binom.ppf(0.99, 40, 0.05)


@pytest.mark.slow
def test_no_more_false_alarms_than_promised() -> None:
    assert quiet_days(200, resamples=drift.RESAMPLES) <= stats.binom.ppf(0.99, 200, 0.05)


def test_a_trifle_is_no_drift_however_many_requests_show_it() -> None:
    feature = FEATURE["words"]
    before = [0] * feature.bins
    before[10:14] = [250_000] * 4
    now = list(before)
    now[10], now[13] = 245_000, 255_000  # half a percent moved, of a million: certain, and of no interest
    reference = traffic.profile([], []).__class__(histograms={"words": tuple(before)})
    [moved] = drift.compare(reference, {"words": now})
    assert moved.value > 0.004
    assert not moved.drifted


def test_quality_drifts_only_downwards() -> None:
    similarity = FEATURE["similarity"]

    def histogram(mean: float) -> list[int]:
        values = np.clip(np.random.default_rng(0).normal(mean, 0.15, 200), 0, 1)
        return [int(n) for n in np.bincount([similarity.bin(v) for v in values], minlength=similarity.bins)]

    reference = traffic.profile([], [], similarities=np.clip(np.random.default_rng(1).normal(0.5, 0.15, 150), 0, 1))
    assert drifted(drift.compare(reference, {"similarity": histogram(0.3)})) == {"similarity"}
    assert drifted(drift.compare(reference, {"similarity": histogram(0.7)})) == set()
    [worse] = drift.compare(reference, {"similarity": histogram(0.3)})
    assert worse.value == pytest.approx(0.2, abs=0.05)


def test_known_words_that_mean_other_things_are_found_where_no_word_is_new() -> None:
    """As many words of the same lengths, of every initial, all known; only of the one half of the meanings."""
    random = np.random.default_rng(5)
    letters = "abcdefghijklmnop"
    words = [f"w{a}{b}" for a in letters for b in letters]
    meaning = {word: random.normal(1 if place % 2 else -1, 1, AXES).tolist() for place, word in enumerate(words)}

    def ask(known: list[str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": " ".join(random.choice(known, 6))}]

    profile = build([(ask(words), 9) for _ in range(900)], embed=lambda found: [meaning[word] for word in found])
    extractor, silent = Extractor(profile), Answer(text="", completion_tokens=0)

    def moved(known: list[str]) -> set[str]:
        rows = [extractor.features(ask(known), silent, 9) for _ in range(300)]
        live = {
            f.name: np.bincount([f.bin(row[n]) for row in rows if row[n] == row[n]], minlength=f.bins).tolist()
            for n, f in enumerate(FEATURES)
        }
        return drifted(drift.compare(profile, live))

    assert moved(words) == set()
    assert {f"embedding_{axis}" for axis in range(1, AXES + 1)} <= moved(words[::2])


def test_every_feature_has_words() -> None:
    for feature in FEATURES:
        before, now = [0] * feature.bins, [0] * feature.bins
        before[0], now[-1] = 50, 50
        moved = drift.Moved(
            feature=feature, statistic="ks", value=1.0, threshold=0.1, before=tuple(before), now=tuple(now)
        )
        found = attributed("input" if feature.side == "input" else "model")
        text = explain.verdict("m", 1, 100, 1, [moved], [], keeps_text=False, found=found)
        assert len(text) > 80, text
        assert not math.isnan(feature.mean(before))


def test_a_share_that_moved_around_its_mean_is_not_said_to_be_as_before() -> None:
    feature = next(f for f in FEATURES if f.name == "punctuation_share")
    before, now = [0] * feature.bins, [0] * feature.bins
    before[2] = 100
    now[1], now[3] = 50, 50
    moved = drift.Moved(feature=feature, statistic="ks", value=0.5, threshold=0.1, before=tuple(before), now=tuple(now))
    text = explain.verdict("m", 1, 100, 1, [moved], [], keeps_text=False, found=attributed("input"))
    assert "of requests on average, as before, but another share of 100 % of them" in text
