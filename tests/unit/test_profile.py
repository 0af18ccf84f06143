"""The feature extractor and the profile."""

from __future__ import annotations

import json
import math
import re
import statistics
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import languages
from registry.profile import AXES, FEATURE, FEATURES, TOPICS, Answer, Extractor, Profile, build, input_text, words


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@given(st.text(max_size=400), st.text(max_size=400), st.integers(0, 10**6))
def test_any_text_gives_the_same_storable_features_every_time(prompt: str, reply: str, tokens: int) -> None:
    extractor = Extractor(build([(ask("read the file"), 3)] * 3))
    answer = Answer(text=reply, completion_tokens=tokens, mean_logprob=-0.1)
    values = extractor.features(ask(prompt), answer, tokens)
    assert len(values) == len(FEATURES)
    again = Extractor(build([(ask("read the file"), 3)] * 3)).features(ask(prompt), answer, tokens)
    layout = f"{len(FEATURES)}f"
    assert struct.pack(layout, *values) == struct.pack(layout, *again)
    for feature, value in zip(FEATURES, values, strict=True):
        if value == value:
            assert 0 <= feature.bin(value) < feature.bins
            assert struct.unpack("f", struct.pack("f", value))[0] == value, "a column of real[] must give it back"


def test_a_profile_survives_json_and_drops_what_another_program_binned_otherwise() -> None:
    profile = build([(ask(f"open file number {i}"), 5) for i in range(9)], similarities=[0.2, 0.4])
    assert Profile.from_json(profile.to_json()) == profile
    foreign = profile.to_json()
    foreign["histograms"]["words"] = [1, 2, 3]
    foreign["histograms"]["no_such_feature"] = [1]
    assert set(Profile.from_json(foreign).histograms) == set(profile.histograms) - {"words"}
    with pytest.raises(ValueError, match="format 2"):
        Profile.from_json({**profile.to_json(), "format": 2})


def test_bins_of_topics_and_answers_are_called_by_what_most_rows_in_them_have() -> None:
    inputs = [(ask(text), 5) for text in ("where is my parcel", "my parcel is late", "who is Karl Ditters")]
    answers = [
        (ask("x"), Answer(text=text, completion_tokens=2), 5)
        for text in (*["order status"] * 3, *["card  arrival"] * 2, "once", "a long answer of many words, " * 4)
    ]
    profile = Profile.from_json(build(inputs, answers).to_json())
    values = dict(zip(FEATURES, Extractor(profile).features(ask("a parcel"), answers[0][1], 5), strict=True))
    for name, called in (("topic", "parcel"), ("answer_mix", "order status")):
        assert profile.group(FEATURE[name], FEATURE[name].bin(values[FEATURE[name]])) == called
    assert set(profile.groups["answer_mix"].values()) == {"order status", "card arrival"}, "nothing that one row had"
    assert set(profile.groups["topic"].values()) == {"parcel"}
    assert re.fullmatch(r"group \d+", profile.group(FEATURE["json_shape"], 3))
    old = build(inputs, answers).to_json()
    del old["groups"]
    assert Profile.from_json(old).groups == {}


def test_a_training_row_is_judged_by_the_words_of_the_others() -> None:
    unique = [(ask(f"alpha beta {name}"), 5) for name in ("one", "two", "three", "four")]
    profile = build(unique)
    # `alpha` and `beta` are known without any row's own words, each row's third word is new: as it will be live.
    assert profile.histograms["unseen_word_share"][FEATURE["unseen_word_share"].bin(1 / 3)] == 4
    assert Extractor(profile).new_words(ask("alpha gamma beta")) == ["gamma"]
    assert profile.vocabulary == {"alpha": 1.0, "beta": 1.0}


AXIS = {"walk": 1.0, "stroll": 2.0, "pay": -3.0, "bank": -4.0, "odd": 9.0, "rare": 50.0}


def embed(words: Sequence[str]) -> list[list[float]]:
    return [[AXIS[word], -AXIS[word], 10 * AXIS[word] + 3, (AXIS[word] - 1) ** 2] for word in words]


def test_what_words_mean_is_told_in_spreads_of_the_training_inputs() -> None:
    answer = Answer(text="", completion_tokens=0)
    asked = [(ask(text), 5) for text in [*3 * ["walk stroll", "pay", "bank pay", "odd"], "rare", "rare"]]
    profile = build(asked, embed=embed)
    extractor = Extractor(profile)
    rows = [extractor.features(ask(text), answer, 5) for text in ("walk stroll", "pay", "bank pay", "odd")]
    for axis in range(1, AXES + 1):
        feature = FEATURE[f"embedding_{axis}"]
        values = [row[FEATURES.index(feature)] for row in rows]
        assert statistics.fmean(values) == pytest.approx(0, abs=1e-3)
        assert statistics.pstdev(values) == pytest.approx(1, abs=1e-3)
        # `rare` is known, but from too few requests for them to be judged by it
        assert sum(profile.histograms[feature.name]) == 12
    assert set(profile.places) == set(AXIS)
    assert all(math.isnan(value) for value in extractor.features(ask("swim"), answer, 5)[-AXES:])
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    other = profile.to_json() | {"places": {"walk": [1.0]}}
    assert Profile.from_json(other).places == {}
    far = Profile.from_json(profile.to_json() | {"places": {"walk": [1e300, -1e300, math.inf, math.nan]}})
    assert all(map(math.isfinite, Extractor(far).features(ask("walk"), answer, 5)[-AXES:]))
    assert build(asked).places == build(3 * [(ask("pay"), 1)], embed=embed).places == {}


def test_system_prompts_and_the_answer_to_learn_are_not_input() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "question"}, {"type": "image_url"}]},
        {"role": "assistant", "content": "reply"},
    ]
    assert input_text(turns) == "question\n"
    assert input_text([*turns, {"role": "user", "content": "more"}]) == "question\n\nreply\nmore"
    assert words("pandas.read_csv2(HTTPError)") == ["pandas", "read", "csv", "httperror"]


def test_what_the_features_say() -> None:
    profile = build([(ask("say hello"), 4)] * 4)
    answer = Answer(text="I'm sorry, I can't help with that.", completion_tokens=9, finish_reason="length")
    got = dict(zip(FEATURE, Extractor(profile).features(ask("SAY 12 hellö!!"), answer, 7), strict=True))
    assert got["prompt_tokens"] == 7
    assert got["characters"] == 14
    assert got["chars_per_token"] == 2
    assert got["digit_share"] == pytest.approx(2 / 14)
    assert got["upper_share"] == pytest.approx(3 / 14)
    assert got["punctuation_share"] == pytest.approx(2 / 14)
    assert got["non_ascii_share"] == pytest.approx(1 / 14)
    assert got["unseen_word_share"] == 0.5
    assert (got["refusal"], got["truncated"], got["empty"]) == (1, 1, 0)
    assert math.isnan(got["mean_logprob"])
    assert math.isnan(got["similarity"])
    loop = Answer(text="go on and " * 30, completion_tokens=90)
    assert dict(zip(FEATURE, Extractor(profile).features(ask("x"), loop, 1), strict=True))["repetition"] > 0.9


def test_languages_and_answers_are_features() -> None:
    profile = build([(ask("where is my parcel"), 4)] * 9 + [(ask("wo ist mein Paket"), 4)])
    assert set(languages.NAMES) == {languages.UNKNOWN, *languages._COMMON, *languages._SCRIPTS.values()}
    assert len(languages.NAMES) <= languages.PLACES
    shares = {languages.NAMES[n]: count for n, count in enumerate(profile.histograms["language"]) if count}
    assert shares == {"English": 9, "German": 1}

    def mix(text: str) -> float:
        values = Extractor(profile).features(ask("?"), Answer(text=text, completion_tokens=2), 1)
        return values[FEATURES.index(FEATURE["answer_mix"])]

    assert mix("order_status") == mix("order status") != mix("card declined")


def test_who_calls_a_tool_says_something() -> None:
    for reason, empty in (("stop", 1.0), ("tool_calls", 0.0)):
        answer = Answer(text="", completion_tokens=9, finish_reason=reason)
        values = Extractor(Profile(histograms={})).features(ask("?"), answer, 1)
        assert values[FEATURES.index(FEATURE["empty"])] == empty


def test_json_answers_are_told_apart_by_their_fields() -> None:
    def shape(text: str) -> float:
        values = Extractor(Profile(histograms={})).features(ask("?"), Answer(text=text, completion_tokens=2), 1)
        return values[FEATURES.index(FEATURE["json_shape"])]

    whole = shape('{"intent": "refund", "amount": 12}')
    assert whole == shape(' {"amount": null, "intent": {"a": 1}}\n')
    assert whole != shape('{"intent": "refund"}')
    none = float(TOPICS)
    assert {shape(text) for text in ("refund", "", '["refund"]', '{"intent": "ref', '{"intent"}', "{" * 5000)} == {none}
