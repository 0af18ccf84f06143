"""The judgement on a real small model: an adapter that was trained is told from the base, and from a worse one."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from lora import able_to_say_anything
from psycopg.types.json import Jsonb

from infra import storage
from infra.db import Connection, transaction
from infra.errors import UsageError
from infra.settings import get_settings
from pipelines import config as configs
from pipelines import config_evaluation, judging, runs
from pipelines.data.tokenise import tokenised
from pipelines.evaluation import report
from pipelines.evaluation.answers import Bench
from pipelines.evaluation.judgement import EXAMPLES, apart_from_each_other, choose, evaluate
from pipelines.tuning.trainer import Member, Outcome, Trainer
from registry import datasets, judgements, prompts, versions, views
from registry.bases import Base, load_model, load_tokenizer
from registry.bundle import Generation
from registry.datasets import Row, make_row
from registry.gates import Gate, decide
from registry.names import parse_ref
from registry.statistics import Estimate

LABELS = ["refund", "order status", "opening hours"]
ASKED = [
    ["money back", "refund me", "return it"],
    ["where is it", "my parcel", "track it"],
    ["are you open", "when", "time"],
]


@dataclass(frozen=True)
class Lengths:
    max_tokens: int = 24
    temperature: float = 0.0


def row(number: int, source: str = "train") -> Row:
    label = number % 3
    asked = f"{ASKED[label][number // 3 % 3]} {number}"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": LABELS[label]}]
    return make_row(turns, source=source, group=str(number))


@dataclass(frozen=True)
class World:
    base: Base
    trained: Path
    barely: Path
    rows: list[Row]


def train(trainer: Trainer, folder: Path, steps: int) -> Path:
    params = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "target_modules": "all-linear",
        "per_device_train_batch_size": 12,
    }
    folder.mkdir()
    member = Member(params=params, seed=0, start=None, init_adapter=None, save_to=folder)
    assert isinstance(trainer.run([member], total_steps=steps, until=steps)[0], Outcome)
    return folder / "adapter"


@pytest.fixture(scope="module")
def world(tiny_made: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    adapters = tmp_path_factory.mktemp("adapters")
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_made.folder, folder, dirs_exist_ok=True)
    able_to_say_anything(folder)
    base = replace(tiny_made, folder=folder, dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path_factory.mktemp("home")))
        get_settings.cache_clear()
        learned = [row(n) for n in range(96)]
        dataset = datasets.keep({"train": learned, "validation": learned[:3]}, counts={}, sources=[], recipe={})
        train_tokens = tokenised(dataset, "train", base, max_tokens=128, system=None)
        validation_tokens = tokenised(dataset, "validation", base, max_tokens=128, system=None)
        model, tokenizer = load_model(base.folder, "float32"), load_tokenizer(base.folder)
        trainer = Trainer(model, train_tokens, validation_tokens, pad=tokenizer.pad_token_id)
        yield World(
            base=base,
            trained=train(trainer, adapters / "trained", 400),
            barely=train(trainer, adapters / "barely", 4),
            rows=[row(n, "feedback" if n % 4 == 0 else "train") for n in range(100, 148)],
        )
    get_settings.cache_clear()


def test_losses_are_those_of_each_row_alone(world: World) -> None:
    """In fp32: batched, padded and with the head on few positions, as one row at a time through PEFT."""
    from peft import PeftModel

    bench = Bench(world.base, {"candidate": world.trained, "base": None})
    cases = bench.cases(world.rows[:9], system="Name the intent.", max_tokens=8)
    found = bench.losses(cases)
    model = load_model(world.base.folder, "float32")
    for name in ("base", "candidate"):
        judged = model if name == "base" else PeftModel.from_pretrained(model, world.trained).eval()
        for case, loss in zip(cases, found[name], strict=True):
            ids = torch.tensor([case.whole])
            with torch.inference_mode():
                logits = judged(ids).logits[0, case.prompt_length - 1 : -1]
            alone = torch.nn.functional.cross_entropy(logits, ids[0, case.prompt_length :])
            assert loss == pytest.approx(float(alone), abs=1e-4)


def test_a_trained_adapter_is_told_from_base_and_champion(world: World) -> None:
    said: list[str] = []
    judged = evaluate(
        base=world.base,
        candidate=world.trained,
        champion=world.barely,
        rows=world.rows,
        training=[row(n) for n in range(96)],
        system=None,
        generation=Lengths(),
        names=("quality", "latency"),
        progress=lambda text, *_: said.append(text),
    )
    found = judged.evaluation
    assert set(found["metrics"]) == {
        "loss", "perplexity", "exact_match", "token_f1", "rouge_l", "chrf", "label_accuracy", "macro_f1",
        "p95_latency_ms", "p95_latency_at_load_ms", "tokens_per_second",
    }  # fmt: skip
    assert found["metrics"]["loss"]["vs_base"]["high"] < 0
    assert found["metrics"]["loss"]["vs_champion"]["high"] < 0
    assert found["metrics"]["label_accuracy"]["vs_base"]["low"] > 0
    assert found["metrics"]["chrf"]["vs_champion"]["low"] > 0
    assert found["metrics"]["perplexity"]["candidate"]["estimate"] < found["metrics"]["perplexity"]["base"]["low"]
    assert found["metrics"]["macro_f1"]["vs_champion"]["low"] > 0
    assert {name: part["loss"]["candidate"]["n"] for name, part in found["slices"].items()} == {
        "source=train": 36,
        "source=feedback": 12,
        **{f"label={label}": 16 for label in LABELS},
        "language=English": 38,
        "language=unknown": 10,
        "length=under 50": 48,
    }
    told = found["about"]["quality"]["labels"]
    assert {line["label"]: line["rows"] for line in told} == dict.fromkeys(LABELS, 16)
    assert all(line["candidate"]["low"] > line["base"]["estimate"] for line in told)
    assert found["rows"] == len(judged.answers) == len(judged.rows) == len(judged.prompt_tokens) == 48
    ended = [answer for answer in judged.answers if answer.finish_reason == "stop"]
    assert ended
    assert all(1 <= answer.completion_tokens <= 24 and -20 < (answer.mean_logprob or 0) < 0 for answer in ended)
    assert len(found["examples"]) == EXAMPLES
    assert {"loss of the expected answers", "answers", "latency"} <= set(said)

    gate = Gate(metric="loss", must="better", against="champion", slice="source=feedback")
    assert decide([gate], found, on_underpowered="refuse", first=False).decision == "pass"
    swapped = evaluate(
        base=world.base,
        candidate=world.barely,
        champion=world.trained,
        rows=world.rows,
        system=None,
        generation=Lengths(),
        names=("quality",),
        limit=24,
    )
    assert decide([gate], swapped.evaluation, on_underpowered="refuse", first=False).decision == "fail"
    assert (swapped.evaluation["rows"], "p95_latency_ms" in swapped.evaluation["metrics"]) == (24, False)


def test_the_report_shows_what_was_found_and_escapes_it(world: World) -> None:
    turns = [{"role": "user", "content": "<script>alert(1)</script>"}, {"role": "assistant", "content": "<b>x</b>"}]
    judged = evaluate(
        base=world.base,
        candidate=world.trained,
        champion=None,
        rows=[*world.rows[:10], make_row(turns)],
        system=None,
        generation=Lengths(),
        names=("quality", "latency"),
    )
    assert judged.evaluation["metrics"]["loss"]["champion"] is None
    decision = decide(
        [Gate(metric="loss", must="better", against="base")], judged.evaluation, on_underpowered="refuse", first=True
    )
    page = report.render("support", judged.evaluation, decision.to_json())
    assert "Passes its gates" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<b>" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "these could show" in page
    assert "By language" in page


def test_a_sample_is_stable_and_keeps_small_slices() -> None:
    rows = [row(n) for n in range(300)] + [row(n, "feedback") for n in range(1000, 1020)]
    chosen = choose(rows, 100, 0)
    assert len(chosen) == 100
    assert sum(r.source == "feedback" for r in chosen) == 20
    assert {r.id for r in choose(rows[::-1], 100, 0)} == {r.id for r in chosen}
    assert {r.id for r in choose(rows, 100, 1)} != {r.id for r in chosen}


def test_of_rows_that_ask_nearly_the_same_one_is_judged_by() -> None:
    def asks(text: str, group: str, source: str = "train") -> Row:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
        return make_row(turns, source=source, group=group)

    places = ["kitchen", "harbour", "museum", "garden", "theatre"]
    alike = [
        asks(f"please tell me the way to the {place} of the old town{end}", place)
        for place in places
        for end in ("", "?", " !")
    ]
    linked = [asks("when does the library open", "g"), asks("who wrote the book about whales", "g")]  # by other rows
    alone = [row(n) for n in range(100, 105)]
    corrected = asks("please tell me the way to the harbour of the old town", "harbour", "feedback")
    found = apart_from_each_other([*alike, *linked, *alone, corrected], 0)
    assert len(found) == 5 + 2 + 5 + 1
    assert {r.group for r in found} >= set(places)
    assert corrected in found
    assert {r.id for r in apart_from_each_other([corrected, *alone, *linked, *alike[::-1]], 0)} == {r.id for r in found}


def test_rows_that_do_not_fit_are_left_out(world: World) -> None:
    turns = [{"role": "user", "content": "x y " * 1500}, {"role": "assistant", "content": "y"}]
    with pytest.raises(UsageError, match="None of the 1 test rows fits"):
        evaluate(
            base=world.base,
            candidate=None,
            champion=None,
            rows=[make_row(turns)],
            system=None,
            generation=Lengths(),
            names=("quality",),
        )


def _register(
    conn: Connection, bundle: str, base: Base, *, dataset_digest: str | None = None, run_id: uuid.UUID | None = None,
    evaluation: str | None = None, gate: str | None = None,
) -> None:  # fmt: skip
    """Version 1 of the model "m", judged by nothing so far unless evidence is given."""
    nothing = ("study", "mlflow_run_id", "mlflow_model_id", "imported_by")
    conn.execute(
        versions.SQL["insert"],
        {
            **dict.fromkeys(nothing),
            "model": "m",
            "number": 1,
            "bundle_digest": bundle,
            "base_digest": base.digest,
            "dataset_digest": dataset_digest,
            "method": "prompt",
            "run_id": run_id,
            "evaluation": evaluation,
            "gate": gate,
            "manifest": Jsonb(orjson.loads((storage.get("bundle", bundle) / "version.json").read_bytes())),
            "metrics": Jsonb({}),
            "profile": Jsonb({}),
        },
    )


def test_a_second_judgement_is_on_the_rows_of_the_first(tiny_base: Base) -> None:
    rows, run = [row(n) for n in range(100, 148)], uuid.uuid4()
    splits = {"train": [row(0)], "validation": [row(1)], "test": rows}
    dataset = datasets.keep(splits, counts={}, sources=[], recipe={})
    first = evaluate(
        base=tiny_base,
        candidate=None,
        champion=None,
        rows=dataset.rows("test"),
        system=None,
        generation=Generation(max_tokens=8),
        names=("quality",),
        limit=5,
        seed=7,
    ).evaluation
    bundle = versions.seal(
        versions.VersionDraft(
            model="m", method="prompt", base=tiny_base, adapter=None, generation=Generation(max_tokens=8),
            dataset=dataset.digest, evaluation=first,
        )
    )  # fmt: skip
    with transaction() as conn:
        datasets.record(conn, "m", dataset)
        begun = {"id": run, "model": "m", "kind": "train", "fingerprint": "f", "config_path": "m.yaml", "token": 1}
        config = Jsonb({"evaluation": {"suites": ["quality"], "limit": 5, "seed": 7}})
        conn.execute(runs.SQL["begin"], {**begun, "config": config, "flow_run_id": None})
        _register(conn, bundle, tiny_base, dataset_digest=dataset.digest, run_id=run)
        registered = versions.get(conn, "m", 1)
    assert {r.id for r in judging.golden_of(registered) or ()} <= {r.id for r in rows}
    assert {r.id for r in judging.golden_rows(dataset.digest, first["answers"])} == first["answers"].keys()
    assert judging.golden_of(replace(registered, dataset_digest="sha256:" + 64 * "0")) is None, "not in this store"
    again = judging.judge_again("m:1", ["quality"])
    clean = {"rows": 0, "of": len(rows), "said": "test rows stand in the system prompt", "examples": []}
    assert again["evaluation"] == first | {"contamination": clean, "dataset": dataset.digest}
    assert (again["evaluation"]["rows"], again["gate"]["decision"]) == (5, "pass")
    with transaction() as conn:
        assert versions.get(conn, "m", 1).gate is None, "nothing is changed by looking"
    attached = judging.judge_again("m:1", attach="another champion serves")
    assert attached["evaluation"]["suites"] == ["quality"], "those of its run"
    with transaction() as conn:
        judged = versions.get(conn, "m", 1)
        assert versions.evidence(conn, judged.gate) == attached["decision"]
        assert versions.evidence(conn, judged.evaluation) == attached["evaluation"]
        assert judged.metrics == versions.headline(attached["evaluation"])
        shown = views.describe(conn, parse_ref("m:1"))
        page = judgements.report(conn, "m", 1)
    assert (shown["gate"]["decision"], shown["judged_again"]["reason"]) == ("pass", "another champion serves")
    assert page is not None
    assert "Passes its gates" in page


def test_a_file_does_not_wave_through_what_a_versions_own_gates_refuse(tmp_path: Path) -> None:
    strict = {"metric": "exact_match", "must": "at_least", "value": 0.99}
    made = {
        "evaluation": {"suites": ["quality", "latency"], "required": ["latency"]},
        "gates": [strict], "approvals": 2, "on_underpowered": None,
    }  # fmt: skip
    (tmp_path / "m.yaml").write_text(
        "model: m\nbase: builtin:tiny\ndata: {train: train.jsonl}\n"
        "evaluation: {suites: [quality, privacy], required: [privacy]}\non_underpowered: ask\n"
        "gates: [{metric: loss, must: at_most, value: 9}, {metric: contamination, must: at_most, value: 100}]\n"
    )
    (tmp_path / "train.jsonl").write_text("{}")
    given = configs.load(tmp_path / "m.yaml")
    kept = judging._policy(made, given, keep=True)
    assert kept is not None
    assert [gate.metric for gate in kept.gates] == ["exact_match", "loss"], "and none that lets rows be learned"
    assert (kept.evaluation.suites, kept.evaluation.required) == (
        ("quality", "latency", "privacy"),
        ("latency", "privacy"),
    )
    assert (kept.approvals, kept.on_underpowered) == (2, "refuse")
    looked = judging._policy(made, given, keep=False)
    assert looked is not None
    assert [gate.metric for gate in looked.gates] == ["loss", "contamination"]
    # Nor is what the own gates speak of measured by the file's laxer scorers
    own = config_evaluation.Evaluation.model_validate({"schema": {"type": "object"}})
    lax = config_evaluation.Evaluation.model_validate({"schema": {}})
    assert judging._scorers(own, lax).answer_schema == own.answer_schema
    assert judging._scorers(None, lax).answer_schema == lax.answer_schema
    plain = config_evaluation.Evaluation()
    assert judging._scorers(own, plain).answer_schema == own.answer_schema
    assert judging._scorers(plain, lax).answer_schema == lax.answer_schema


def test_a_version_made_elsewhere_keeps_what_its_own_gates_refused(tiny_base: Base, tmp_path: Path, home: Path) -> None:
    gate = Gate(metric="exact_match", must="at_least", value=0.99)
    nothing = Estimate(estimate=0.0, low=0.0, high=0.1, n=50, higher_is_better=True).to_json()
    found = {
        "metrics": {"exact_match": {"candidate": nothing}}, "slices": {}, "suites": ["quality"], "rows": 50,
        "contamination": {"rows": 3, "of": 60, "examples": []},
    }  # fmt: skip
    decision = decide([gate], found, on_underpowered="refuse", first=True, required={"latency": ["p95_latency_ms"]})
    bundle = versions.seal(
        versions.VersionDraft(
            model="m", method="prompt", base=tiny_base, adapter=None, generation=Generation(max_tokens=8)
        )
    )
    with transaction() as conn:
        conn.execute(versions.SQL["ensure_model"], {"model": "m"})
        kept = [versions.keep_evidence(conn, "evaluation", found),
                versions.keep_evidence(conn, "gate", decision.to_json())]  # fmt: skip
        _register(conn, bundle, tiny_base, evaluation=kept[0], gate=kept[1])
    for name, start in (("train", 0), ("test", 300)):
        lines = [{"messages": list(row(n).messages)} for n in range(start, start + 60)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(orjson.dumps(line) for line in lines))
    (tmp_path / "m.yaml").write_text(
        "model: m\nbase: builtin:tiny\ndata: {train: train.jsonl, test: test.jsonl}\n"
        "evaluation: {suites: [quality], limit: 6}\ngates: [{metric: loss, must: at_most, value: 90}]\n"
    )
    again = judging.judge_again("m:1", config=tmp_path / "m.yaml", attach="ours")["decision"]
    said = {entry["metric"]: entry["decision"] for entry in again["gates"]}
    assert said == {"exact_match": "fail", "loss": "pass", "suite latency": "pass", "contamination": "fail"}
    assert again["decision"] == "fail"


def test_a_version_made_elsewhere_is_judged_on_rows_of_ones_own(tiny_base: Base, tmp_path: Path, home: Path) -> None:
    bundle = versions.seal(
        versions.VersionDraft(
            model="m", method="prompt", base=tiny_base, adapter=None, generation=Generation(max_tokens=8)
        )
    )
    with transaction() as conn:
        conn.execute(versions.SQL["ensure_model"], {"model": "m"})
        _register(conn, bundle, tiny_base)
    with pytest.raises(UsageError, match="m:1 was not made by a run here: there are no gates"):
        judging.judge_again("m:1", attach="ours")
    with pytest.raises(UsageError, match="m:1 was not trained here: there are no test rows"):
        judging.judge_again("m:1")
    for name, start in (("train", 0), ("test", 300)):
        lines = [{"messages": list(row(n).messages)} for n in range(start, start + 60)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(orjson.dumps(line) for line in lines))
    (tmp_path / "m.yaml").write_text(
        "model: m\nbase: builtin:tiny\ndata: {train: train.jsonl, test: test.jsonl}\n"
        "evaluation: {suites: [quality], limit: 6}\n"
        "gates: [{metric: exact_match, must: at_least, value: 0.99}]\n"
    )
    found = judging.judge_again("m:1", config=tmp_path / "m.yaml", attach="ours")
    assert found["gate"] is None
    assert found["decision"]["decision"] == "fail"
    assert found["decision"]["reasons"][-1] == "contamination: not known, since m:1 was not trained here"
    with transaction() as conn:
        assert versions.list_versions(conn, "m")[0]["gate"] == "fail"


def test_tokens_hold_the_prompt_as_served_and_the_answer_with_its_end(world: World, home: Path) -> None:
    rows = [row(n) for n in range(20)]
    turns = [{"role": "user", "content": "x y " * 100}, {"role": "assistant", "content": "y"}]
    dataset = datasets.keep({"train": [*rows, make_row(turns)]}, counts={}, sources=[], recipe={})
    tokens = tokenised(dataset, "train", world.base, max_tokens=128, system="Be brief.")
    tokenizer = load_tokenizer(world.base.folder)
    assert (len(tokens), tokens.too_long) == (20, 1)
    for number, one in enumerate(rows):
        ids, length = tokens.row(number).tolist(), int(tokens.prompt_lengths[number])
        assert ids[:length] == prompts.encode(tokenizer, one.prompt, system="Be brief.")
        assert tokenizer.decode(ids[length:-1]) == one.answer
        assert ids[-1] == tokenizer.eos_token_id
    assert isinstance(tokens.ids, np.memmap)
    whole = {tuple(tokens.row(i)): int(tokens.prompt_lengths[i]) for i in range(len(tokens))}
    drawn = [tokens.sample(3, seed=n) for n in range(9)]
    for some in drawn:
        assert len({tuple(some.row(i)) for i in range(3)}) == len(some) == 3
        assert all(whole[tuple(some.row(i))] == some.prompt_lengths[i] for i in range(3))
    assert len({tuple(some.ids) for some in drawn}) > 1
    assert tokens.sample(10_000, seed=1) is tokens
    assert tokenised(dataset, "train", world.base, max_tokens=128, system="Be brief.").digest == tokens.digest
    assert tokenised(dataset, "train", world.base, max_tokens=128, system=None).digest != tokens.digest
    with pytest.raises(UsageError, match="All 21 train rows are longer than 8 tokens"):
        tokenised(dataset, "train", world.base, max_tokens=8, system=None)
