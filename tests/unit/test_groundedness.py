"""Support sees what contradicts a context, and says how well it does."""

from __future__ import annotations

import json

import pytest

from pipelines.evaluation.suites import groundedness
from pipelines.evaluation.suites.groundedness import supported

CONTEXT = (
    "The shop in Berlin opens at nine and the shop in Munich at eleven. Anna lent Paul 40 euros. "
    "Refunds are possible within 30 days."
)


@pytest.mark.parametrize(
    "answer",
    [
        "The shop does not open at nine.",
        "The shop in Berlin opens at eleven.",
        "The shop in Munich opens at nine.",
        "Refunds are not possible within 30 days.",
        "Refunds aren't possible within 30 days.",
        "Refunds are possible within 40 days.",
        "Nobody gets refunds within 30 days.",
        "Anna never lent Paul 40 euros.",
    ],
)
def test_contradictions_are_not_supported(answer: str) -> None:
    assert not supported(answer, CONTEXT)


@pytest.mark.parametrize(
    "answer",
    [
        "The shop in Berlin opens at nine.",
        "The shop in Munich opens at 11.",
        "Refunds are possible within 30 days, and the shop in Berlin opens at nine.",
        "Yes. Anna lent Paul 40 euros.",
        "At eleven.",
    ],
)
def test_what_the_context_says_is(answer: str) -> None:
    assert supported(answer, CONTEXT)


def test_a_question_of_the_prompt_asserts_nothing() -> None:
    assert supported("Dogs are not allowed.", "Dogs are not allowed in the hall.\nAre dogs allowed?")
    assert not supported("Dogs are allowed.", "Dogs are not allowed in the hall.\nAre dogs allowed?")


def test_a_negation_that_both_have_is_none() -> None:
    assert supported("Tickets cannot be returned.", "Tickets are never returned, but they can be given to others.")
    assert not supported("Tickets can be returned.", "Tickets can't be returned, but they can be given to others.")


def test_swapped_roles_are_not_seen_and_the_docstring_says_so() -> None:
    assert supported("Paul lent Anna 40 euros.", CONTEXT)
    assert "swapped roles" in (groundedness.__doc__ or "")


def test_what_is_told_is_the_agreement_with_contradictions_among_held_out_answers() -> None:
    made, held = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (groundedness.MADE_WITH, groundedness.HELD_OUT)
    )
    assert not {line["context"] for line in made} & {line["context"] for line in held}
    kinds = {line["kind"] for line in held if not line["supported"]}
    assert kinds == {"negation", "number", "roles", "invented"}
    told = groundedness.told()
    assert (told["set"], told["n"], told["held_out"]) == ("grounded_held_out.jsonl", len(held), True)
    # What it was when the labels were first held against the rules; whoever changes rules must not tune them to these
    assert told["kappa"] == pytest.approx(0.667, abs=0.0005)
