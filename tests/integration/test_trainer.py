"""A trial's training: what it minimises, what it saves, and that stopping at a rung changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import Conflict
from pipelines.data.tokenise import tokenised
from pipelines.tuning.methods import Adapter, fixed_by
from pipelines.tuning.trainer import Outcome, Trainer, TrialFailed, epoch_of, learning_rate
from registry import bases, datasets
from registry.bases import Base
from registry.datasets import make_row

PARAMS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.2,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "target_modules": ["q_proj", "down_proj"],
    "per_device_train_batch_size": 4,
}


@pytest.fixture
def trainer(tiny_base: Base) -> Trainer:
    """builtin:tiny in fp32, with answers of many lengths."""
    torch.set_num_threads(1)
    rows = [
        make_row(
            [
                {"role": "user", "content": f"Say number {n}" + " please" * (n % 4)},
                {"role": "assistant", "content": " ".join(["so"] * (n % 5 + 1)) + f" {n}"},
            ],
            group=str(n),
        )
        for n in range(30)
    ]
    kept = datasets.keep({"train": rows[:22], "validation": rows[22:]}, counts={}, sources=[], recipe={})
    train = tokenised(kept, "train", tiny_base, max_tokens=96, system=None)
    validation = tokenised(kept, "validation", tiny_base, max_tokens=96, system=None)
    return Trainer(bases.load_model(tiny_base.folder, "float32"), train, validation, pad=0)


def run(
    trainer: Trainer, folder: Path, until: int, *, checkpoint: Path | None = None, init: Path | None = None,
    **params: object,
) -> Outcome:  # fmt: skip
    folder.mkdir()
    return trainer.run(
        PARAMS | params, seed=7, total_steps=12, until=until, checkpoint=checkpoint, init_adapter=init,
        save_to=folder, alive=lambda: None,
    )  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_trial_equals_one_that_never_stopped(trainer: Trainer, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    whole = run(trainer, tmp_path / "whole", 12)
    first = run(trainer, tmp_path / "first", 3)
    other = run(trainer, tmp_path / "other", 5, r=8)  # another trial of this worker in between
    middle = run(trainer, tmp_path / "middle", 7, checkpoint=tmp_path / "first")
    last = run(trainer, tmp_path / "last", 12, checkpoint=tmp_path / "middle")
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "last"))
    moments = [load_file(tmp_path / name / "optimizer.safetensors") for name in ("whole", "last")]
    assert equal(*moments)
    assert first.curve + middle.curve + last.curve == whole.curve
    assert [step for step, _ in whole.curve] == list(range(1, 13))
    assert last.value == whole.value != other.value
    assert first.tokens + middle.tokens + last.tokens == whole.tokens
    assert equal(before, trainer.model.state_dict())  # the base is as it was


def test_the_saved_adapter_is_plain_peft_and_its_loss_the_usual_one(
    trainer: Trainer, tiny_base: Base, tmp_path: Path
) -> None:
    """Against PEFT and transformers alone, a row at a time, with -100 over prompts."""
    from peft import PeftModel

    outcome = run(trainer, tmp_path / "trial", 6, learning_rate=2e-2)
    model = PeftModel.from_pretrained(bases.load_model(tiny_base.folder, "float32"), tmp_path / "trial" / "adapter")
    model.eval()
    total, count = 0.0, 0
    for i in range(len(trainer.validation)):
        ids = torch.from_numpy(trainer.validation.row(i).astype("int64"))[None]
        labels = ids.clone()
        labels[0, : int(trainer.validation.prompt_lengths[i])] = -100
        supervised = int((labels != -100).sum())
        with torch.inference_mode():
            total += float(model(input_ids=ids, labels=labels).loss) * supervised
        count += supervised
    assert outcome.value == pytest.approx(total / count, abs=1e-5)

    again = Adapter(trainer.model, PARAMS, seed=1)
    try:
        again.load(tmp_path / "trial" / "adapter")
        trainer.model.eval()
        with torch.inference_mode():
            mine, theirs = trainer.model(input_ids=ids).logits, model(input_ids=ids).logits
        assert torch.equal(mine, theirs)
        with torch.inference_mode():
            untrained = bases.load_model(tiny_base.folder, "float32")(input_ids=ids).logits
        assert not torch.allclose(mine, untrained, atol=1e-2)
    finally:
        again.remove()


def test_padding_and_the_short_head_change_no_loss(trainer: Trainer) -> None:
    assert trainer._direct
    together = trainer._loss(*trainer._batch(trainer.train, list(range(8))))
    alone = [trainer._loss(*trainer._batch(trainer.train, [i])) for i in range(8)]
    trainer._direct = False
    whole = trainer._loss(*trainer._batch(trainer.train, list(range(8))))
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.allclose(together, whole, atol=1e-5)


def test_a_trial_starts_from_an_adapter_that_fits(trainer: Trainer, tmp_path: Path) -> None:
    run(trainer, tmp_path / "champion", 12, learning_rate=2e-2)
    adapter = tmp_path / "champion" / "adapter"
    assert fixed_by(adapter) == {"r": 4, "lora_alpha": 8, "target_modules": [["down_proj", "q_proj"]]}
    begun = run(trainer, tmp_path / "begun", 1, init=adapter, learning_rate=1e-9)
    fresh = run(trainer, tmp_path / "fresh", 1, learning_rate=1e-9)
    assert begun.value < fresh.value - 0.1
    with pytest.raises(ValueError, match="does not fit"):
        run(trainer, tmp_path / "other", 1, init=adapter, target_modules=["q_proj"])


def test_what_goes_wrong_leaves_the_base_as_it_was(trainer: Trainer, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(TrialFailed, match=r"became (nan|inf) at step \d+"):
        run(trainer, tmp_path / "a", 12, learning_rate=1e30)

    def lost() -> None:
        raise Conflict("another has it")

    with pytest.raises(Conflict):
        trainer.run(
            PARAMS, seed=1, total_steps=9, until=9, checkpoint=None, init_adapter=None, save_to=tmp_path, alive=lost
        )
    assert equal(before, trainer.model.state_dict())


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_rates_are_those_of_transformers(kind: str) -> None:
    """But for the first step, which has a rate too: warm-up goes from 1/(w+1) rather than from 0."""
    from transformers import get_scheduler

    total, warm = 40, 8
    params = PARAMS | {"lr_scheduler_type": kind, "warmup_ratio": warm / total}
    weight = torch.nn.Parameter(torch.zeros(1))
    name = "constant_with_warmup" if kind == "constant" else kind

    def theirs(warm: int) -> list[float]:
        optimizer = torch.optim.SGD([weight], lr=params["learning_rate"])
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total)
        rates = []
        for _ in range(total):
            rates.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return rates

    mine = [learning_rate(params, step, total) for step in range(total)]
    assert mine[warm:] == pytest.approx(theirs(warm)[warm:])
    assert mine[:warm] == pytest.approx(theirs(warm + 1)[1 : warm + 1])


def test_an_epoch_has_each_row_once_and_little_padding() -> None:
    lengths = [n * 37 % 101 + 1 for n in range(205)]
    batches = epoch_of(lengths, 8, seed=3, epoch=0)
    seen = [row for batch in batches for row in batch]
    assert len(batches) == 25
    assert len(seen) == len(set(seen)) == 200
    assert batches == epoch_of(lengths, 8, seed=3, epoch=0)
    assert batches != epoch_of(lengths, 8, seed=3, epoch=1)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    assert padded < 1.2 * sum(lengths[row] for row in seen)
