"""A hosted model, and prompts without an adapter, in the table of a candidate: quality, latency, cost, break-even."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from address_peer import Answer, serving

from infra import ports
from infra.errors import Unreachable
from pipelines.config_address import Address, Hosted, HostedPrice
from pipelines.evaluation import report
from pipelines.evaluation.answers import Bench
from pipelines.evaluation.catalogue import DEFAULT, SUITES
from pipelines.evaluation.judgement import Serving, evaluate
from registry import prompts
from registry.bases import Base
from registry.bundle import Generation
from registry.datasets import Row, make_row
from registry.gates import Gate, decide
from registry.pricing import MachinePrice

ROWS = 30
PRICE = HostedPrice(input_per_million_usd=1000, output_per_million_usd=4000)


def row(number: int) -> Row:
    turns = [
        {"role": "user", "content": f"Where is parcel {number}?"},
        {"role": "assistant", "content": "order status"},
    ]
    return make_row(turns, group=str(number))


def slow(body: dict[str, Any]) -> str:
    time.sleep(0.05)
    return "order status"


@pytest.fixture(scope="module")
def base(tiny_made: Base) -> Base:
    return replace(tiny_made, dtype="float32")


def judged(base: Base, hosted: Hosted | None, *names: str, **more: Any) -> dict[str, Any]:
    return evaluate(
        base=base, candidate=None, champion=more.pop("champion", None), rows=[row(n) for n in range(ROWS)],
        system=more.pop("system", "Name the intent."), generation=Generation(max_tokens=4), names=names, hosted=hosted,
        machine=MachinePrice(per_machine_hour_usd=more.pop("hour", 0.10)), **more,
    ).evaluation  # fmt: skip


def test_it_is_one_more_column_of_quality_latency_and_cost(base: Base) -> None:
    training = [make_row([{"role": "user", "content": "a secret"}, {"role": "assistant", "content": "a@example.org"}])]
    with serving(slow, "big-2026-11") as peer:
        hosted = Hosted(url=peer.url, model="big", price=PRICE)
        found = judged(base, hosted, "quality", "latency", "cost", "privacy", training=training)
        assert len(peer.bodies) == ROWS
        assert {text.split()[0] for text in peer.asked()} == {"Where"}  # test rows alone, and none of privacy's
        assert peer.bodies[0]["messages"][0] == {"role": "system", "content": "Name the intent."}
        gaps = [later - earlier for earlier, later in zip(peer.times[:23], peer.times[1:24], strict=True)]
        assert min(gaps) >= 0.05  # one at a time, for their latency
    metrics, about = found["metrics"], found["about"]
    assert metrics["exact_match"]["hosted"]["estimate"] == 1
    assert metrics["exact_match"]["vs_hosted"]["n"] == ROWS
    assert metrics["chrf"]["vs_hosted"]["high"] < 0
    assert found["slices"]["source=train"]["exact_match"]["hosted"]["n"] == ROWS
    assert "hosted" not in metrics["loss"]
    assert "hosted" not in metrics["perplexity"]
    assert "hosted" not in metrics["tokens_per_second"]
    assert "hosted" not in metrics["personal_data"]
    assert about["hosted"]["not_applicable"].keys() == {
        "loss", "perplexity", "tokens_per_second", "p95_latency_at_load_ms"
    }  # fmt: skip
    assert about["hosted"]["served"] == ["big-2026-11"]
    latency = metrics["p95_latency_ms"]
    assert latency["hosted"]["n"] == latency["vs_hosted"]["n"] == min(24, latency["candidate"]["n"])
    assert 50 <= latency["hosted"]["estimate"] < 1000
    # Seven words in, two out, as this server counts
    cost = metrics["cost_per_1000_usd"]
    assert cost["hosted"]["estimate"] == pytest.approx(7 * 1.0 + 2 * 4.0)
    seconds = about["cost"]["seconds_per_request"]
    assert cost["candidate"]["estimate"] == pytest.approx(1000 * seconds / 3600 * 0.10)
    assert about["cost"]["break_even_per_day"]["estimate"] == pytest.approx(24 * 0.10 / 0.015)
    assert "From 160 requests a day" in about["cost"]["notes"][0]
    assert all(example["hosted"] == "order status" for example in found["examples"])
    page = report.render("m", found, {"decision": "pass", "gates": [], "reasons": []})
    assert "New against hosted" in page
    assert "From 160 requests a day" in page


def test_a_cheap_enough_hosted_model_is_never_beaten(base: Base) -> None:
    cheap = HostedPrice(input_per_million_usd=0.0001, output_per_million_usd=0.0001)
    with serving(lambda body: "order status") as peer:
        found = judged(base, Hosted(url=peer.url, model="big", price=cheap), "cost", hour=10.0)
    assert found["about"]["cost"]["break_even_per_day"] == {"estimate": None, "low": None, "high": None}
    assert "at no volume that it can answer" in found["about"]["cost"]["notes"][0]


def test_one_that_is_down_is_one_sentence_and_costs_the_candidate_nothing(base: Base) -> None:
    url = f"http://127.0.0.1:{ports.free()}/v1"
    found = judged(base, Hosted(url=url, model="big", price=PRICE), "quality", "latency", "cost")
    assert all("hosted" not in values or values["hosted"] is None for values in found["metrics"].values())
    assert found["about"]["hosted"]["unavailable"].startswith(f"{url} does not answer (")
    (note,) = found["about"]["hosted"]["notes"]
    assert note == f"The hosted model is unavailable: {found['about']['hosted']['unavailable']}."
    assert "break_even_per_day" not in found["about"]["cost"]
    gate = Gate(metric="loss", must="at_most", value=100)
    assert decide([gate], found, on_underpowered="refuse", first=True).decision == "pass"
    page = report.render("m", found, {"decision": "pass", "gates": [], "reasons": []})
    assert "New against hosted" not in page
    assert "The hosted model is unavailable: http://127.0.0.1" in page


def test_rows_without_its_answer_are_left_out_of_its_column(base: Base) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        return (400, {}, {}) if body["messages"][-1]["content"] in LOST else "order status"

    LOST = {f"Where is parcel {n}?" for n in (3, 17)}
    with serving(answer) as peer:
        found = judged(base, Hosted(url=peer.url, model="big", system="Be brief."), "quality", "cost")
        assert {body["messages"][0]["content"] for body in peer.bodies} == {"Be brief."}
    exact = found["metrics"]["exact_match"]
    assert (exact["hosted"]["n"], exact["vs_hosted"]["n"], exact["candidate"]["n"]) == (ROWS - 2, ROWS - 2, ROWS)
    assert (
        "2 of 30 requests to it have no answer (0 timed out, 0 limited, 2 failed)." in found["about"]["hosted"]["notes"]
    )
    assert found["about"]["cost"]["notes"] == [
        "The cost of the hosted model is unavailable: no price is given (evaluation.hosted.price)."
    ]
    LOST |= {f"Where is parcel {n}?" for n in range(0, 30, 6)}
    with serving(answer) as peer:
        found = judged(base, Hosted(url=peer.url, model="big"), "quality")
    assert "hosted" not in found["metrics"]["exact_match"]
    assert "requests have no answer" in found["about"]["hosted"]["unavailable"]


def test_an_address_that_counts_no_tokens_has_no_cost(base: Base) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        return 200, {}, {"choices": [{"message": {"content": "order status"}}]}

    with serving(answer) as peer:
        found = judged(base, Hosted(url=peer.url, model="big", price=PRICE), "cost")
    assert found["about"]["hosted"]["served"] == ["big"]
    assert "hosted" not in found["metrics"]["cost_per_1000_usd"]
    assert "its answers do not say how many tokens they have" in json.dumps(found["about"]["cost"])


def test_prompts_on_one_base_are_each_asked_with_their_own(base: Base) -> None:
    """Base without a prompt, candidate and champion with theirs: the numbers are those of each alone."""
    one, other = "Name the intent.", "Reply with the words order status and nothing else, whatever you are asked."
    both = judged(base, None, "quality", system=one, champion=Serving(adapter=None, system=other))["metrics"]["loss"]
    alone = judged(base, None, "quality", system=other)["metrics"]["loss"]
    assert both["champion"]["estimate"] == pytest.approx(alone["candidate"]["estimate"], abs=1e-5)
    assert both["base"]["estimate"] == pytest.approx(alone["base"]["estimate"], abs=1e-5)
    figures = [both[who]["estimate"] for who in ("candidate", "champion", "base")]
    assert all(abs(a - b) > 1e-3 for n, a in enumerate(figures) for b in figures[n + 1 :])

    bench = Bench(base, {"candidate": None, "base": None})
    (case,) = bench.cases([row(1)], system=one, max_tokens=4, own={"base": None})
    assert list(case.of("base").prompt) == prompts.encode(bench.tokenizer, row(1).prompt)
    assert list(case.of("candidate").prompt) == prompts.encode(bench.tokenizer, row(1).prompt, system=one)
    begun = replace(case, prompt_length=case.prompt_length + 2).of("base")  # as privacy gives an answer's beginning
    assert begun.whole == case.of("base").whole
    assert begun.prompt_length == case.of("base").prompt_length + 2
    too_long = "word " * 3000
    assert bench.cases([row(1)], system=one, max_tokens=4, own={"champion": too_long}) == []


def test_an_adapter_and_its_base_have_the_same_prompt(base: Base, tmp_path: Path) -> None:
    from lora import save_adapter

    from registry.bases import load_model

    adapter = save_adapter(load_model(base.folder, "float32"), tmp_path / "adapter", seed=1)
    found = evaluate(
        base=base, candidate=adapter, champion=Serving(adapter=None, system="Name the intent."),
        rows=[row(n) for n in range(6)], system="Name the intent.", generation=Generation(max_tokens=4),
        names=("quality",),
    ).evaluation["metrics"]["loss"]  # fmt: skip
    assert found["base"] == found["champion"]
    assert found["candidate"] != found["base"]


def _hosted_candidate(base: Base, peer: Any, *names: str, **more: Any) -> dict[str, Any]:
    address = Address(url=peer.url, model="big", options={"user": "us"})
    evaluation: dict[str, Any] = evaluate(
        base=base, candidate=address, champion=more.pop("champion", None), rows=[row(n) for n in range(ROWS)],
        system="Name the intent.", generation=Generation(max_tokens=4), names=names, price=PRICE.tokens,
        machine=MachinePrice(per_machine_hour_usd=0.10), **more,
    ).evaluation  # fmt: skip
    return evaluation


def test_a_hosted_candidate_stands_beside_the_base_and_a_champion_on_it(base: Base) -> None:
    with serving(slow) as peer:
        found = _hosted_candidate(
            base, peer, *SUITES, champion=Serving(adapter=None, system="Be brief."), judge=None, hosted=None
        )
    metrics, about = found["metrics"], found["about"]
    assert metrics["exact_match"]["candidate"]["estimate"] == 1
    assert metrics["exact_match"]["vs_champion"]["n"] == metrics["exact_match"]["vs_base"]["n"] == ROWS
    assert metrics["p95_latency_ms"]["candidate"]["estimate"] >= 50
    assert metrics["consistency"]["candidate"]["estimate"] == 1
    # Seven words in, two out, as this server counts
    assert metrics["cost_per_1000_usd"]["candidate"]["estimate"] == pytest.approx(7 + 2 * 4)
    assert "the serving version on" in about["cost"]["notes"][-1]
    for metric in ("loss", "perplexity", "tokens_per_second", "general_text_loss", "answer_tokens_per_word"):
        assert metric not in metrics
        assert metric in found["unavailable"]
    assert {body["user"] for body in peer.bodies} == {"us"}
    # What cannot be told passes no gate
    decision = decide([Gate(metric="loss", must="better")], found, on_underpowered="refuse", first=False)
    assert decision.decision == "fail"
    assert "Hosted" not in report.render("m", found, decision.to_json())


def test_its_profile_counts_tokens_as_it_does(base: Base) -> None:
    with serving(slow) as peer:
        judged = evaluate(
            base=base, candidate=Address(url=peer.url, model="big"), champion=None, rows=[row(1)], system=None,
            generation=Generation(max_tokens=4), names=("quality",),
        )  # fmt: skip
    assert (judged.prompt_tokens, judged.answers[0].completion_tokens) == ([4], 2)
    assert judged.answers[0].mean_logprob is None


def test_a_hosted_champion_is_asked_the_test_rows_alone(base: Base) -> None:
    with serving(slow) as peer:
        champion = Serving(adapter=Address(url=peer.url, model="big"), system="Be big.", price=PRICE.tokens)
        found = judged(base, None, *DEFAULT, "cost", "consistency", "privacy", "compatibility", champion=champion)
    assert {text.split()[0] for text in peer.asked()} == {"Where"}
    assert len(peer.bodies) == 2 * ROWS + 1  # for quality, and one at a time for latency, after one untimed
    assert peer.bodies[0]["messages"][0] == {"role": "system", "content": "Be big."}
    metrics = found["metrics"]
    assert metrics["exact_match"]["champion"]["estimate"] == 1
    assert metrics["golden_kept"]["candidate"] is not None
    assert metrics["consistency"]["champion"] is None
    assert metrics["loss"]["vs_champion"] is None
    assert "the new version on" in found["about"]["cost"]["notes"][-1]


def test_a_hosted_champion_is_asked_the_rows_that_it_was_judged_by(base: Base) -> None:
    golden = [row(n) for n in range(ROWS - 2, ROWS + 4)]
    with serving(slow) as peer:
        champion = Serving(adapter=Address(url=peer.url, model="big"), system=None, price=PRICE.tokens)
        found = judged(base, None, "compatibility", champion=champion, golden=golden)
    assert len(peer.bodies) == ROWS + 4, "the two that are test rows too are asked once"
    assert found["about"]["compatibility"]["asked"] == found["metrics"]["golden_kept"]["champion"]["n"] == 6
    assert found["metrics"]["golden_kept"]["champion"]["estimate"] == 1


def test_a_candidate_that_does_not_answer_is_not_judged(base: Base) -> None:
    def fails(body: dict[str, Any]) -> Answer:
        return 400, {}, {"error": {"message": "no"}}

    with serving(fails) as peer, pytest.raises(Unreachable, match="cannot be judged"):
        _hosted_candidate(base, peer, "quality")


def test_a_version_that_costs_more_on_purpose_fails_its_gate(base: Base) -> None:
    """Twice the words for the same question, at the same price; the same words pass."""
    gate = Gate(metric="cost_per_1000_usd", against="champion", must="not_worse", margin=1.0)
    with serving(slow) as terse, serving(lambda body: "order status, that is what it is") as wordy:
        champion = Serving(adapter=Address(url=terse.url, model="big"), system="Name the intent.", price=PRICE.tokens)
        for peer, decision in ((terse, "pass"), (wordy, "fail")):
            found = _hosted_candidate(base, peer, "latency", "cost", champion=champion)
            decided = decide([gate], found, on_underpowered="refuse", first=False)
            assert decided.decision == decision, decided.reasons
