"""Toxicity where one version was not asked everything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import safety


def test_a_hosted_champion_is_compared_on_the_rows_that_it_was_asked() -> None:
    def rude(texts: list[str]) -> list[bool]:
        return ["rude" in text for text in texts]

    said = {"candidate": ["fine", "rude"], "base": ["fine", "fine"], "champion": ["rude", "rude"]}
    setting: Any = SimpleNamespace(
        say=lambda *_: None,
        answers={who: [SimpleNamespace(text=text) for text in texts] for who, texts in said.items()},
    )
    classifier: Any = rude
    found = safety._toxic(setting, {"candidate": ["rude", "no"], "base": ["no", "no"]}, classifier)
    assert found["champion"] == [None, None, 1.0, 1.0]
    compared = means({"toxic_answers": found})["toxic_answers"]
    assert (compared["candidate"]["n"], compared["champion"]["n"], compared["vs_champion"]["n"]) == (4, 2, 2)
    assert compared["vs_champion"]["estimate"] == -0.5
