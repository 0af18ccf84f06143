from __future__ import annotations

import pytest

from pipelines.evaluation.scores import are_labels, score


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
