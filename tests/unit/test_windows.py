"""Windows merge exactly, and percentiles are as near as promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring import windows
from monitoring.windows import RELATIVE_ERROR, Window, Words, bucket, percentile, total
from registry.profile import FEATURES


def event(slot: str, status: int, latency: float, tokens: int, cost: float, values: list[float]) -> dict[str, Any]:
    return {
        "status": status,
        "slot": slot,
        "latency_ms": latency,
        "ttft_ms": latency / 2,
        "prompt_tokens": tokens,
        "completion_tokens": tokens,
        "engine_seconds": cost,
        "cost_usd": cost,
        "features": values,
        "messages": None,
    }


EVENTS = st.builds(
    event,
    st.sampled_from(["champion", "challenger", "pinned", "shadow"]),
    st.sampled_from([200, 200, 400, 429, 500, 503]),
    st.floats(0, 1e9) | st.just(float("nan")),
    st.integers(0, 10_000),
    st.floats(0, 100) | st.just(float("inf")),
    st.lists(st.floats(width=32), min_size=len(FEATURES), max_size=len(FEATURES)) | st.just([]),
)
WINDOWS = st.builds(
    lambda found, said: total([Window(feedback=said), *(windows.of_event(e) for e in found)]),
    st.lists(EVENTS, max_size=6),
    st.dictionaries(st.sampled_from(sorted(windows.FEEDBACK)), st.integers(-5, 50)),
)


@given(WINDOWS, WINDOWS, WINDOWS)
@settings(max_examples=60, deadline=None)
def test_merging_is_associative_and_commutative_and_loses_nothing(a: Window, b: Window, c: Window) -> None:
    assert (a + b) + c == a + (b + c) == total((c, a, b))
    assert a + b == b + a
    assert a + Window() == a
    assert (a + b).requests == a.requests + b.requests == sum((a + b).status.values())
    chosen = (a + b + c).chosen
    assert (chosen.requests if chosen else 0) == sum((a + b + c).slots.get(slot, 0) for slot in ("pinned", "shadow"))


@given(WINDOWS)
@settings(max_examples=40, deadline=None)
def test_a_window_survives_the_database(window: Window) -> None:
    sketches = orjson.loads(orjson.dumps(windows.to_json(window), option=orjson.OPT_NON_STR_KEYS))
    row = {"requests": window.requests, "errors": window.errors, "sketches": sketches}
    assert windows.from_row(row) == window


@given(st.lists(st.floats(0.011, 1e7), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0]))
@settings(max_examples=200, deadline=None)
def test_percentiles_are_within_the_stated_error(durations: list[float], q: float) -> None:
    counts: dict[int, int] = {}
    for duration in durations:
        counts[bucket(duration)] = counts.get(bucket(duration), 0) + 1
    found = percentile(counts, q)
    assert found == pytest.approx(float(np.quantile(durations, q, method="lower")), rel=RELATIVE_ERROR * 1.0001)


def test_no_answers_have_no_percentile() -> None:
    assert percentile({}, 0.5) is None


@given(st.lists(st.lists(st.integers(0, 1500), max_size=700), min_size=1, max_size=6), st.randoms())
@settings(max_examples=25, deadline=None)
def test_new_words_are_bounded_and_their_error_is_stated(parts: list[list[int]], random: Any) -> None:
    exact: dict[str, int] = {}
    made = []
    for part in parts:
        counts: dict[str, int] = {}
        for number in part:
            counts[f"w{number}"] = counts.get(f"w{number}", 0) + 1
            exact[f"w{number}"] = exact.get(f"w{number}", 0) + 1
        made.append(Words() + Words(counts=counts))
    random.shuffle(made)
    merged = sum(made, Words())
    assert len(merged.counts) <= 512
    assert merged.error <= sum(exact.values()) / 513
    for word, true in exact.items():
        assert true - merged.error <= merged.counts.get(word, 0) <= true
