from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from pipelines.evaluation import labels, power, slices
from pipelines.evaluation.comparison import means
from pipelines.evaluation.scores import are_labels, score
from registry import languages
from registry.datasets import make_row, normalise
from registry.statistics import Estimate, detectable, mean_ci, paired_difference, rows_for


def test_metrics_are_those_of_their_sources() -> None:
    given = ["the cat sat", "Return the path.", "", "Москва здесь", "order_status."]
    wanted = ["the cat sat", "return a path", "x", "Москва там", "order_status"]
    found = score(given, wanted, labels=True)
    assert found["exact_match"] == [1, 0, 0, 0, 0]
    assert found["label_accuracy"] == [1, 0, 0, 0, 1]
    assert found["token_f1"] == pytest.approx([1, 2 / 3, 0, 1 / 2, 1])
    assert found["rouge_l"] == pytest.approx([1, 2 / 3, 0, 1 / 2, 1])
    assert found["chrf"][0] == 1
    assert all(0 <= value <= 1 for values in found.values() for value in values)


def test_labels_are_told_from_texts() -> None:
    assert are_labels(["yes", "no", "yes", "no"])
    assert are_labels([f"intent_{n}" for n in range(100)])
    assert not are_labels(["Return the path of a file.", "Open a file.", "Close it, whatever happens to it."])
    assert not are_labels(["same"] * 10)


def test_f1_of_labels_is_scikit_learns_and_rare_labels_count() -> None:
    draw = random.Random(1)
    expected = [draw.choice(["refund"] * 8 + ["order status"] * 3 + ["Hours"]) for _ in range(120)]
    given = [e if draw.random() < 0.7 else draw.choice(["refund.", "hours", "something else"]) for e in expected]
    names = labels.frequent(expected, 9)
    truth, said = ([normalise(text) for text in texts] for texts in (expected, given))
    theirs = f1_score(truth, said, labels=[normalise(n) for n in names], average=None, zero_division=0)
    lines = labels.by_label({"candidate": given, "base": expected}, expected)
    assert [line["label"] for line in lines] == names == sorted(names, key=expected.count, reverse=True)
    assert [line["candidate"]["estimate"] for line in lines] == pytest.approx(list(theirs))
    assert all(line["candidate"]["low"] < line["candidate"]["estimate"] < line["candidate"]["high"] for line in lines)
    found = labels.macro_f1({"candidate": given, "base": expected}, expected, names)
    assert found["candidate"]["estimate"] == pytest.approx(theirs.mean())
    assert found["base"]["estimate"] == found["base"]["high"] == 1
    assert found["base"]["low"] < mean_ci([1.0] * 120, higher_is_better=True).low  # not 1, and rare labels count
    assert found["vs_base"]["estimate"] == pytest.approx(theirs.mean() - 1)
    assert found["vs_base"]["high"] < 0
    # A version that never says a rare label: hardly seen by accuracy
    blind = ["refund" if e == "Hours" else e for e in expected]
    seen = labels.macro_f1({"candidate": blind, "base": expected}, expected, names)["candidate"]
    assert score(blind, expected, labels=True)["label_accuracy"].count(1) > 0.85 * len(expected)
    assert seen["high"] < 0.8


def test_two_that_are_always_right_may_differ_on_other_rows() -> None:
    expected = ["refund", "hours"] * 40
    found = labels.macro_f1({"candidate": expected, "base": expected}, expected, expected)["vs_base"]
    # A twentieth of a label's rows may be wrong (rule of three): an F1 that is lower by half as much, of one in two
    assert (found["low"], found["high"]) == pytest.approx((-0.024, 0.024), rel=0.1)


def test_labels_that_may_not_have_been_seen_leave_no_lower_end() -> None:
    """Macro F1 falls by a label's whole share where one of them is never right."""
    expected = ["refund", "hours", "other"] * 12
    answers = {"candidate": expected, "base": expected}
    unknown = labels.macro_f1(answers, expected)["vs_base"]
    assert (unknown["low"], unknown["least_n"]) == (None, 157)
    assert unknown["high"] > 0.25
    assert labels.macro_f1(answers, expected, ["Refund", "hours", "other"])["vs_base"]["low"] > -0.2
    missing = labels.macro_f1(answers, expected, ["refund", "hours", "other", "never asked"])["vs_base"]
    assert (missing["low"], missing["least_n"]) == (None, 210)
    assert labels.macro_f1({"candidate": expected * 5, "base": expected * 5}, expected * 5)["vs_base"]["low"] > -0.1


def test_f1_of_labels_leaves_out_rows_without_an_answer() -> None:
    expected = ["refund"] * 20 + ["hours"] * 10 + ["never answered"] * 5
    hosted = [None, *["refund"] * 19, *["hours"] * 9, None, *[None] * 5]
    ours = ["refund", "hours", *["refund"] * 18, *["hours"] * 10, *["refund"] * 5]
    found = labels.macro_f1({"candidate": ours, "base": ours, "hosted": hosted}, expected)
    answered = [n for n, said in enumerate(hosted) if said is not None]
    part = labels.macro_f1({"candidate": [ours[n] for n in answered]}, [expected[n] for n in answered])
    assert (found["hosted"]["estimate"], found["hosted"]["n"], found["candidate"]["n"]) == (1, 28, 35)
    assert found["vs_hosted"]["estimate"] == pytest.approx(part["candidate"]["estimate"] - 1)
    assert found["vs_hosted"]["estimate"] < 0
    lines = {line["label"]: line for line in labels.by_label({"candidate": ours, "hosted": hosted}, expected)}
    assert lines["never answered"]["hosted"] is None
    assert lines["never answered"]["candidate"]["estimate"] == 0
    alone = mean_ci([1.0] * 9, higher_is_better=True)
    assert (lines["hours"]["hosted"]["low"], lines["hours"]["rows"]) == (pytest.approx(alone.low), 10)


def test_answers_are_valid_by_a_json_schema_or_not() -> None:
    schema = {
        "type": "object", "required": ["intent"], "additionalProperties": False,
        "properties": {"intent": {"$ref": "#/$defs/label"}, "sure": {"type": "number", "maximum": 1}},
        "$defs": {"label": {"enum": ["refund", "hours"]}},
    }  # fmt: skip
    valid = ['{"intent": "refund"}', ' {"intent": "hours", "sure": 0.5}\n']
    not_valid = [
        "refund", "", '{"intent": "other"}', '{"intent": "refund"} and more', '{"intent": "refund", "sure": NaN}',
        '["refund"]', '{"intent": "refund", "more": 1}', "[" * 100_000,
    ]  # fmt: skip
    answers = valid + not_valid
    found = score(answers, [""] * len(answers), labels=False, schema=schema)["schema_valid"]
    assert found == [1.0] * len(valid) + [0.0] * len(not_valid)
    assert "schema_valid" not in score(answers, [""] * len(answers), labels=False)


def test_languages_are_guessed_by_script_and_common_words() -> None:
    told = {
        "Where is my parcel and when will it come?": "English",
        "what are the opening hours on sunday": "English",
        "Wo ist mein Paket und wann kommt es an?": "German",
        "Wie viel kostet die Reparatur?": "German",
        "Où est mon colis et quand est-ce qu'il arrive ?": "French",
        "¿Dónde está mi paquete y cuándo llega?": "Spanish",
        "Dov'è il mio pacco e quando arriva?": "Italian",
        "Onde está a minha encomenda e quando é que chega?": "Portuguese",
        "Waar is mijn pakket en wanneer komt het aan?": "Dutch",
        "Gdzie jest moja paczka i kiedy do mnie dotrze?": "Polish",
        "Var är mitt paket och när kommer det?": "Swedish",
        "Paketim nerede ve ne zaman gelecek?": "Turkish",
        "Где моя посылка?": "Cyrillic script",
        "我的包裹在哪里？": "Chinese",
        "荷物はどこですか": "Japanese",
        "내 소포는 어디에 있나요?": "Korean",
        "أين طردي؟": "Arabic script",
        "12345 !?": languages.UNKNOWN,
        "SKU-17": languages.UNKNOWN,
    }
    assert {text: languages.guess(text) for text in told} == told


def test_slices_are_by_source_label_language_and_length_and_bounded() -> None:
    asked = ["where is my parcel", "wo ist mein Paket und wann kommt es", "what is the time " * 20]
    rows = [
        make_row(
            [{"role": "user", "content": f"{asked[n % 3]} {n}"}, {"role": "assistant", "content": f"label_{n % 12}"}],
            source="feedback" if n % 4 == 0 else "train",
        )
        for n in range(61)
    ]
    found = slices.parts(rows, wanted={"label=label_11", "label=unheard"})
    assert len(found["source=train"]) + len(found["source=feedback"]) == 61
    assert [name for name in found if name.startswith("label=")] == [f"label=label_{n}" for n in (*range(8), 11)]
    assert {len(found["language=English"]), len(found["language=German"])} == {41, 20}
    assert [name for name in found if name.startswith("length=")] == ["length=under 50", "length=200 to 999"]
    measured = {"chrf": {"candidate": [float(n % 3) for n in range(61)], "base": [0.0] * 61}}
    parts = slices.measure(rows, measured, means(measured))
    assert parts["language=German"]["chrf"]["candidate"]["estimate"] == 1
    assert parts["length=200 to 999"]["chrf"]["vs_base"]["estimate"] == 2


def test_what_a_comparison_can_tell_is_told() -> None:
    draw = np.random.default_rng(0)
    small = power.of(paired_difference(draw.normal(0.05, 1, 50), np.zeros(50), higher_is_better=True).to_json())
    assert small.effect == "too few rows"
    assert small.least == pytest.approx(2.8 / 50**0.5, rel=0.25)  # (1.96 + 0.84) deviations over the root of the rows
    assert small.rows is not None
    assert small.rows > 50
    said = f"about {small.rows:,} rows would show this much; these could show {small.least:.2f} or more"
    assert power.in_words(small, "{:.2f}") == said
    large = power.of(paired_difference(draw.normal(-2, 1, 50), np.zeros(50), higher_is_better=False).to_json())
    assert (large.effect, large.rows) == ("better", None)
    assert power.in_words(large, "{:.2f}").startswith("these could show 0.")
    # Rows of which a few are far worse: a loss is shown by the other end of the interval than a gain
    skewed = Estimate(estimate=0.1, low=-0.3, high=0.2, n=50, higher_is_better=True)
    for sign, better in ((1, True), (-1, False)):
        ends = sorted((sign * skewed.low, sign * skewed.high))
        turned = replace(skewed, estimate=0.1 * sign, low=ends[0], high=ends[1], higher_is_better=better)
        told = power.of(turned.to_json())
        assert told.least == pytest.approx(detectable(skewed))  # the gates' own figure
        assert (told.effect, told.rows) == ("too few rows", rows_for(skewed, 0.1))
    lost = power.of(replace(skewed, estimate=-0.1).to_json())
    assert lost.least is not None
    assert told.least is not None
    assert lost.least < told.least
    equal = power.of(paired_difference([1.0] * 9, [1.0] * 9, higher_is_better=True).to_json())
    assert (equal.effect, equal.rows) == ("not shown", None)
    one = paired_difference([0.3], [0.2], higher_is_better=True).to_json()
    assert power.in_words(power.of(one), "{:.2f}") == ""
