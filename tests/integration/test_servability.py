"""Nothing is registered that an engine could not serve as it was trained: limits, digests, equal log-probabilities."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.adapters import Adapters
from infra.db import one, transaction
from infra.errors import Refused, UsageError
from infra.settings import get_settings
from pipelines import plans, runs, stages
from pipelines.config import load
from pipelines.evaluation import servability
from pipelines.tuning.methods import Alone, Targets, packable
from pipelines.tuning.pack import Pack
from registry import bases, datasets, prompts, servable
from registry.bases import Base
from registry.datasets import Row, make_row

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


def params(**more: Any) -> dict[str, Any]:
    plain = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "weight_decay": 0.0, "target_modules": "all-linear"}
    return plain | more


def rows(count: int = 6) -> list[Row]:
    asked = [f"where is parcel {n} that I sent on monday" for n in range(count)]
    return [
        make_row([{"role": "user", "content": a}, {"role": "assistant", "content": f"in hall {a[16]}"}]) for a in asked
    ]


def logprobs(model: Any, ids: list[int], length: int) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, length - 1 : -1].float().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[length:])[:, None])[:, 0]


def trained(base: Base, folder: Path, given: dict[str, Any]) -> list[torch.Tensor]:
    """An adapter that moved far from its beginning, saved as a trial saves it; what it says while it is in training."""
    model, tokenizer = bases.load_model(base.folder, base.dtype), bases.load_tokenizer(base.folder)
    torch.manual_seed(3)
    form: Any = Pack(model, [given], [0], Targets(model)) if packable(given) else Alone(model, given, 0)
    with torch.no_grad():
        for parameter in [form.values] if packable(given) else form.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    pairs = [prompts.encode_pair(tokenizer, row.messages) for row in rows()]
    if packable(given):
        form.changed()
    with form.attached():
        said = [logprobs(model if packable(given) else form.peft, *pair) for pair in pairs]
        form.save(0, folder)
    return said


def check(base: Base, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    return servability.check(base, folder, given, rows(), None)


def test_long_rows_are_looked_at_where_their_answers_begin(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny_base, tmp_path / "adapter", params())
    monkeypatch.setattr(servability, "_LONGEST", 7)  # no row is as short
    found = check(tiny_base, tmp_path / "adapter", params())
    assert (found["rows"], found["differences"]["float32"] < 1e-4) == (6, True)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_served_as_it_was_trained(tiny_base: Base, tmp_path: Path, method: str) -> None:
    given = params(**METHODS[method])
    said = trained(tiny_base, tmp_path / "adapter", given)
    found = check(tiny_base, tmp_path / "adapter", given)
    assert (found["rank"], found["max_rank"], found["rows"]) == (8 if method == "pissa" else 4, 256, 6)
    assert 0 <= found["differences"]["float32"] < 1e-4
    # And what was checked is what training itself had in memory, before anything was saved or converted
    model, tokenizer = bases.load_model(tiny_base.folder, "float32"), bases.load_tokenizer(tiny_base.folder)
    base_says = [logprobs(model, *prompts.encode_pair(tokenizer, row.messages)) for row in rows()]
    adapters = Adapters(model)
    adapter = adapters.load("a", tmp_path / "adapter")
    for row, then, untuned in zip(rows(), said, base_says, strict=True):
        with adapters.rows([adapter]):
            now = logprobs(model, *prompts.encode_pair(tokenizer, row.messages))
        assert float((now - then).abs().max()) < 1e-3
        assert float((untuned - then).abs().max()) > 0.05
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # What vLLM asks of an adapter: plain LoRA or rsLoRA, nothing trained beside it
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("LORA", "none", None)
    assert config["use_dora"] is (method == "dora")
    assert config["init_lora_weights"] is True


def test_in_bf16_the_forms_agree_up_to_rounding_and_a_wrong_scale_does_not(tiny_base: Base, tmp_path: Path) -> None:
    half, tokenizer = tmp_path / "half", bases.load_tokenizer(tiny_base.folder)
    bases.load_model(tiny_base.folder, "bfloat16").save_pretrained(half)
    tokenizer.save_pretrained(half)
    digest, tokens, template = bases.identity(half, bases.load_tokenizer(half))
    base = replace(
        tiny_base, folder=half, digest=digest, tokenizer_digest=tokens, template_digest=template, dtype="bfloat16"
    )
    trained(base, tmp_path / "adapter", params())
    found = check(base, tmp_path / "adapter", params())
    assert 0 < found["differences"]["bfloat16"] < 0.1
    assert found["differences"]["float32"] < 1e-4
    # Rounding hides a scale that is twice as large, which fp32 shows; of a base too large for that, more must be wrong
    for alpha, parameters, dtype in ((16, base.parameters, "float32"), (128, 7_000_000_000, "bfloat16")):
        _change(tmp_path / "adapter", lora_alpha=alpha)
        with pytest.raises(Refused, match=f"not served as it was trained: on 6 validation rows .* token in {dtype}"):
            check(replace(base, parameters=parameters), tmp_path / "adapter", params())


def _change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_would_not_be_served_as_trained_is_refused_in_a_sentence(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    trained(tiny_base, whole, params())

    def refused(words: str, **config: Any) -> None:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        _change(broken, **config)
        tensors = load_file(broken / "adapter_model.safetensors")
        first = next(iter(tensors))
        if "no linear layer" in words:
            tensors[first.replace("layers.0", "layers.99")] = tensors.pop(first)
        elif "base's weight" in words:
            tensors[first] = tensors[first][:, :-1].contiguous()
        elif "no low-rank matrix" in words:
            tensors["base_model.model.lm_head.weight"] = tensors[first].clone()
        elif "not the trial's" in words:
            tensors = {name: value for name, value in tensors.items() if "layers.0.mlp.up_proj" not in name}
        save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Refused, match=words):
            check(tiny_base, broken, params())

    refused("is not served as it was trained", lora_alpha=16)
    refused("is not served as it was trained", use_rslora=True)
    refused("no linear layer model.layers.99")
    refused("the base's weight")
    refused("no low-rank matrix")
    refused("not the trial's: .* other target modules or rank")
    refused("uses modules_to_save", modules_to_save=["lm_head"])
    monkeypatch.setenv("TUNESMITH_MAX_LORA_RANK", "3")
    get_settings.cache_clear()
    refused("its rank at .* is 4, and engines here take 3 at most")


@pytest.mark.parametrize(
    ("file", "what"), [("chat_template.jinja", "template_digest"), ("tokenizer.json", "tokenizer_digest")]
)
def test_a_base_that_was_changed_in_the_store_is_refused_naming_both_digests(
    tiny_base: Base, tmp_path: Path, file: str, what: str
) -> None:
    trained(tiny_base, tmp_path / "adapter", params())
    copy = tmp_path / "base"
    shutil.copytree(tiny_base.folder, copy)
    text = (copy / file).read_text()
    if file == "tokenizer.json":
        text = json.dumps(
            json.loads(text)
            | {"truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}
        )
    (copy / file).write_text(text + (" " if file != "tokenizer.json" else ""))
    with pytest.raises(Refused, match=f"is served has {what} sha256:.*trained on with {getattr(tiny_base, what)}"):
        check(replace(tiny_base, folder=copy), tmp_path / "adapter", params())


def test_a_run_registers_nothing_that_is_not_servable(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in rows(40)))
    path = tmp_path / "m.yaml"
    path.write_text("model: m\nbase: builtin:tiny\ndata: {train: train.jsonl}\ntuning: {space: {r: [4, 16]}}\n")
    plan = plans.Plan(kind="train", config=load(path), config_path=path, champion=None)
    splits: dict[datasets.Split, list[Row]] = {"train": rows(40), "validation": rows(), "test": rows()}
    dataset = datasets.keep(splits, counts={"train": 40}, sources=[], recipe={})
    data = {"dataset": dataset.digest, "base": tiny_base.digest, "counts": {"train": 40}}
    trained(tiny_base, tmp_path / "adapter", params())
    _change(tmp_path / "adapter", lora_alpha=16)
    best = {"adapter": str(tmp_path / "adapter"), "params": params(), "study": "s", "trial": 0}
    begun = {"model": "m", "kind": "train", "fingerprint": "f", "config": {}, "config_path": "m.yaml"}
    with pytest.raises(Refused, match="not served as it was trained"), runs.begin(**begun, flow_run_id=None) as run:
        stages.evaluate(plan, run, data, best)
    with transaction() as conn:
        assert one(conn, "select count(*) as n from version")["n"] == 0
        assert one(conn, "select state, error from run")["state"] == "failed"
    monkeypatch.setenv("TUNESMITH_MAX_LORA_RANK", "8")
    get_settings.cache_clear()
    with pytest.raises(UsageError, match="adapters of rank 16"), runs.begin(**begun, flow_run_id=None) as run:
        stages.search(plan, run, data)


def test_files_alone_tell_what_an_import_may_not_be(tiny_base: Base, tmp_path: Path) -> None:
    trained(tiny_base, tmp_path / "adapter", params(use_dora=True))
    assert servable.check(tmp_path / "adapter", tiny_base.folder) == 4
