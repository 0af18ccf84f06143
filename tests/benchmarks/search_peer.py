"""The peer of search.py: Optuna, transformers' Trainer and PEFT in a loop, and MLflow's own ways to log.

Run as a process, ``search_peer.py WHAT JOB.json``, so that threads and memory are its own; prints events as JSON
lines, with times in Unix seconds. Rows come tokenised: the peer gets that for nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
Rows = Sequence[Mapping[str, list[int]]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def say(**event: Any) -> None:
    print(json.dumps(event | {"at": time.time()}), flush=True)


def tune(job: Job) -> None:
    """The loop: a fresh model a trial, Trainer to the last step or until the pruner says so, the loss on all
    validation rows, the best adapter kept in ``job["keep"]``."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows, collate = read_rows(job), collator(job)
    rungs = job["rungs"]
    pruner: Any = optuna.pruners.NopPruner()
    if job["hyperband"]:
        pruner = optuna.pruners.HyperbandPruner(
            min_resource=rungs[0], max_resource=rungs[-1], reduction_factor=job["reduction"]
        )
    study = optuna.create_study(study_name=f"peer-{job['seed']}", direction="minimize", pruner=pruner)
    for number in range(job["trials"]):
        study.sampler = sampler(job["seed"], number)
        trial = study.ask()
        params = suggest(trial, job["space"])
        model = with_adapter(load_model(job), params, seed=number)
        measure: Measure | None = None
        if job["hyperband"]:
            measure = Measure(trial, rungs, lambda m: score(m, rows["validation"], collate, job)[0])
        trainer = make_trainer(job, model, params, rows["train"], collate, seed=number, callbacks=[measure])
        steps = trainer.train().global_step
        if measure is not None:
            value, pruned = measure.value, measure.pruned
        else:
            value, pruned = score(model, rows["validation"], collate, job)[0], False
        if not math.isfinite(value):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            say(trial=number, params=params, steps=steps, value=None, state="failed")
        elif pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            say(trial=number, params=params, steps=steps, value=value, state="pruned")
        else:
            study.tell(trial, value)
            if study.best_trial.number == number:
                model.save_pretrained(job["keep"])
            say(trial=number, params=params, steps=steps, value=value, state="done")
        del model, trainer, measure
        gc.collect()


def sampler(seed: int, number: int) -> Any:
    """Our search's own scheme, so that the configurations drawn at random are the same ones on both sides."""
    import optuna

    mixed = int(hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:8], 16)
    # Optuna's own; ours is the same but for what it does with few results (`draws.good`)
    return optuna.samplers.TPESampler(seed=mixed, constant_liar=True)


def suggest(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for name, value in space.items():
        if isinstance(value, Mapping):
            params[name] = trial.suggest_float(name, value["low"], value["high"], log=value["log"])
        elif isinstance(value, list) and len(value) > 1:
            params[name] = trial.suggest_categorical(name, value)
        else:
            params[name] = value[0] if isinstance(value, list) else value
    return params


def load_model(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if job["precision"] == "bf16 base" else torch.float32
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, local_files_only=True)


def with_adapter(model: Any, params: Mapping[str, Any], *, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    targets = ATTENTION if params["target_modules"] == "attention" else params["target_modules"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params["r"],
        lora_alpha=params["lora_alpha"],
        lora_dropout=params["lora_dropout"],
        target_modules=targets,
    )
    return get_peft_model(model, config)


def make_trainer(
    job: Job, model: Any, params: Mapping[str, Any], rows: Rows, collate: Any, *, seed: int, callbacks: Sequence[Any]
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=job["scratch"],
        max_steps=job["steps"],
        per_device_train_batch_size=params["per_device_train_batch_size"],
        learning_rate=params["learning_rate"],
        lr_scheduler_type=params["lr_scheduler_type"],
        warmup_steps=math.ceil(params["warmup_ratio"] * job["steps"]),
        weight_decay=params["weight_decay"],
        max_grad_norm=params["max_grad_norm"],
        bf16=job["precision"] == "autocast",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed,
        train_sampling_strategy="sequential",  # rows come in the order that both sides take
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    given = [callback for callback in callbacks if callback is not None]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=given)
    trainer.remove_callback(PrinterCallback)  # standard output is for events
    return trainer


def collator(job: Job) -> Any:
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(job["base"], local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer)  # pads the labels too


def read_rows(job: Job) -> dict[str, Rows]:
    """Rows as a Trainer takes them: ids, mask, and labels that leave out the prompt."""
    return {
        split: [
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * prompt + ids[prompt:],
            }
            for ids, prompt in rows
        ]
        for split, rows in json.loads(Path(job["rows"]).read_text()).items()
    }


def score(model: Any, rows: Rows, collate: Any, job: Job) -> tuple[float, int]:
    """The mean negative log-likelihood of a completion token over all rows, and how many such tokens there are."""
    import torch

    model.eval()
    total, count = 0.0, 0
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "autocast")
    with torch.inference_mode(), autocast:
        for start in range(0, len(rows), 16):
            batch = collate(list(rows[start : start + 16]))
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            total, count = total + losses.item(), count + int((labels != -100).sum())
    return total / count, count


def Measure(trial: Any, rungs: Sequence[int], value_of: Callable[[Any], float]) -> Any:
    """A Trainer's callback that reports to Optuna at the rungs, and stops what the pruner gives up."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        value, pruned = math.nan, False

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step in rungs:
                self.value = value_of(model)
                trial.report(self.value, state.global_step)
                if state.global_step < rungs[-1] and trial.should_prune():
                    self.pruned = control.should_training_stop = True

    return Callback()


def Clock() -> Any:
    """A Trainer's callback that notes when each step ended."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.times.append(time.time())

    return Callback()


def train_each(job: Job) -> None:
    """``job["adapters"]``, one after the other on one base that is loaded once; for each, when its first and last
    step ended, and its losses before and after, of the rows that it trains on."""
    rows, collate = read_rows(job)["train"], collator(job)
    model = load_model(job)
    for number, params in enumerate(job["adapters"]):
        adapted = with_adapter(model, params, seed=number)
        before, _ = score(adapted, rows, collate, job) if job["check"] else (None, 0)
        clock = Clock()
        make_trainer(job, adapted, params, rows, collate, seed=number, callbacks=[clock]).train()
        after, _ = score(adapted, rows, collate, job) if job["check"] else (None, 0)
        tokens = sum(len(row["input_ids"]) for row in rows[:1]) * params["per_device_train_batch_size"]
        say(begun=clock.times[0], ended=clock.times[-1], tokens=tokens * (len(clock.times) - 1), before=before,
            after=after)  # fmt: skip
        model = adapted.unload()


def judge(job: Job) -> None:
    """The losses of the base and of PEFT adapters, in fp32, on the splits asked for: one scorer for both sides."""
    from peft import PeftModel

    rows, collate = read_rows(job), collator(job)
    for folder in job["adapters"]:
        model = load_model(job)
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        say(adapter=folder, **{split: score(model, rows[split], collate, job)[0] for split in job["splits"]})


def log(job: Job) -> None:
    """A study's curves in MLflow by one of its own ways: ``log_metric`` a step, the same asynchronously (buffered: it
    gathers points for a second, else every point is a request), or one ``log_batch`` a trial."""
    if job["way"] == "buffered":
        os.environ["MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS"] = "1"
    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    mlflow.set_experiment(job["experiment"])
    with mlflow.start_run(run_name="study"):
        client = MlflowClient()
        say(begun=True)
        for number, curve in enumerate(job["curves"]):
            with mlflow.start_run(run_name=f"trial {number}", nested=True) as run:
                mlflow.log_params(job["params"])
                if job["way"] == "log_batch":
                    now = int(time.time() * 1000)
                    points = [Metric("train_loss", loss, now, step) for step, loss in enumerate(curve, 1)]
                    for start in range(0, len(points), 1000):
                        client.log_batch(run.info.run_id, metrics=points[start : start + 1000])
                else:
                    for step, loss in enumerate(curve, 1):
                        mlflow.log_metric("train_loss", loss, step=step, synchronous=job["way"] == "log_metric")
                mlflow.log_metric("validation_loss", curve[-1], step=len(curve))
        if job["way"] in ("asynchronous", "buffered"):
            mlflow.flush_async_logging()
    say(ended=True)


if __name__ == "__main__":
    what = {"tune": tune, "train_each": train_each, "judge": judge, "log": log}[sys.argv[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        what(json.loads(Path(sys.argv[2]).read_text()))
