"""A judge of our own, trained and served by the gateway; and one that learned the opposite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_peer
import pytest
from serving import add_version, child, make_stand, wait_for

from infra.db import transaction
from infra.settings import Settings
from pipelines.config_address import Judge
from pipelines.data.tokenise import tokenised
from pipelines.evaluation.judgement import evaluate
from pipelines.tuning.trainer import Member, Outcome, Trainer
from registry import datasets, deployments
from registry.bases import Base, load_model, load_tokenizer
from registry.bundle import Generation
from registry.datasets import Row, make_row

GOOD, BAD = ("refund", "money"), ("parcel", "clock")
PROMPT = "{answer} was said to: {question}"


def judging(number: int, *, right: bool) -> Row:
    good = number % 2 == 0
    answer = (GOOD if good else BAD)[number // 2 % 2]
    asked = PROMPT.format(question=f"I want {number} back", answer=answer)
    verdict = f"Verdict: {'good' if good is right else 'bad'}"
    return make_row([{"role": "user", "content": asked}, {"role": "assistant", "content": verdict}], group=str(number))


def train(base: Base, folder: Path, *, right: bool) -> Path:
    rows = [judging(n, right=right) for n in range(240)]
    dataset = datasets.keep({"train": rows, "validation": rows[:2]}, counts={}, sources=[], recipe={})
    tokens = [tokenised(dataset, split, base, max_tokens=128, system=None) for split in ("train", "validation")]
    trainer = Trainer(load_model(base.folder, base.dtype), *tokens, pad=load_tokenizer(base.folder).pad_token_id)
    params = {
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "learning_rate": 2e-3, "lr_scheduler_type": "linear",
        "warmup_ratio": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0, "target_modules": "all-linear",
        "per_device_train_batch_size": 12,
    }  # fmt: skip
    folder.mkdir()
    member = Member(params=params, seed=0, start=None, init_adapter=None, save_to=folder)
    assert isinstance(trainer.run([member], total_steps=700, until=700)[0], Outcome)
    return folder / "adapter"


@pytest.mark.slow
def test_a_trained_judge_agrees_with_people_and_one_that_learned_the_opposite_does_not(
    database: Settings, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, right in ((1, True), (2, False)):
        adapter = train(tiny_base, tmp_path / f"judge{number}", right=right)
        add_version("judge", number, base=tiny_base.digest, adapter=adapter)
    with transaction() as conn:
        deployments.promote(conn, "judge", 1, actor="test", reason="test", force=True)
    labelled = tmp_path / "labelled.jsonl"
    lines = [
        {"question": f"I want {n} back", "answer": (GOOD if n % 2 == 0 else BAD)[n // 2 % 2], "good": n % 2 == 0}
        for n in range(100, 124)
    ]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    turns = [
        [{"role": "user", "content": f"I want {n} back"}, {"role": "assistant", "content": "refund"}] for n in range(6)
    ]
    asked = [make_row(turn) for turn in turns]
    with make_stand(database.home) as stand:
        with transaction() as conn:
            conn.execute("delete from engine")
        port = stand.engine_url.rsplit(":")[-1]
        engine = ("-m", "pipelines.cli", "engine", "--base", tiny_base.digest, "--port", port)
        environment = {"TUNESMITH_ENGINE_SECRET": engine_peer.SECRET, "OMP_NUM_THREADS": "1"}
        with child(*engine, log=database.home / "engine.log", **environment), stand.running_gateway():
            wait_for(lambda: stand._status() == 200, 120, f"for gateway and engine, see {database.home}")
            monkeypatch.setenv("JUDGE_KEY", stand.keys["service"])

            def ask(model: str) -> dict[str, Any]:
                address = {"url": f"{stand.url}/v1", "model": model, "key_env": "JUDGE_KEY"}
                return evaluate(
                    base=tiny_base,
                    candidate=None,
                    champion=None,
                    rows=asked,
                    system=None,
                    generation=Generation(max_tokens=4),
                    names=("judge",),
                    judge=Judge(**address, labelled=labelled, prompt=PROMPT),
                ).evaluation

            right, wrong = ask("judge"), ask("judge:2")
            events = stand.wait_events(2)
    about = right["about"]["judge"]
    assert (about["asked"], about["served"], about["agreement"]["n"]) == ("judge", "judge:1", 24)
    assert about["agreement"]["kappa"] > 0.6
    assert right["metrics"]["judged_good"]["candidate"]["n"] == 6
    assert right["doubted"] == {}
    assert wrong["about"]["judge"]["served"] == "judge:2"
    assert wrong["about"]["judge"]["agreement"]["kappa"] < -0.6
    assert "is under 0.4" in wrong["doubted"]["judged_good"]
    assert {event["version"] for event in events} == {1, 2}
