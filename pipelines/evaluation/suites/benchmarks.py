"""Benchmarks: public ones, as EleutherAI's lm-evaluation-harness asks and scores them (the extra `lm-eval`).

Every question's score is compared, paired, as those of test rows are. Prompts are the harness's own, so that its
figures can be held against published ones; with `apply_chat_template` they are chats, with each version's system
prompt.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
from typing import Any

from pipelines.config_scorers import Benchmarks
from pipelines.evaluation.comparison import means
from pipelines.evaluation.suites import Finding, Setting
from registry.statistics import in_words, mean_ci

METRIC = "benchmark_score"
_NAMES = {"candidate": "the version", "base": "the base", "champion": "the serving version"}
_BATCH = 8
Scores = dict[str, tuple[str, list[float]]]
"""task -> the name of its score, and one number a question"""


def measure(setting: Setting) -> Finding:
    """A champion that is hosted has no number here: most benchmarks want probabilities."""
    wanted = setting.benchmarks
    if wanted is None:
        return _unavailable("no tasks are named (evaluation.benchmarks)")
    if "candidate" not in setting.bench.here:
        return _unavailable("the probabilities of a hosted model are not known")
    if importlib.util.find_spec("lm_eval") is None:
        return _unavailable("lm-eval is not installed; run pip install 'tunesmith[lm-eval]'")
    scored: dict[str, Scores] = {}
    for number, who in enumerate(setting.bench.here):
        setting.say(f"public benchmarks, {_NAMES[who]}", number, len(setting.bench.here))
        try:
            scored[who] = _scores(setting, who, wanted)
        except Exception as error:  # of the harness, of the hub, of data sets: of any family
            return _unavailable(f"lm-eval says: {(str(error) or type(error).__name__).splitlines()[0][:300]}")
    tasks = scored["candidate"]
    return Finding(
        metrics=means(
            {METRIC: {who: [v for _, values in own.values() for v in values] for who, own in scored.items()}}
        ),
        about={
            "lm_eval": importlib.metadata.version("lm_eval"),
            "notes": [
                f"{task} ({score}, {len(values)} questions): "
                + ", ".join(f"{_NAMES[who]} {_in_words(own[task][1])}" for who, own in scored.items())
                for task, (score, values) in tasks.items()
            ],
        },
    )


def _scores(setting: Setting, who: str, wanted: Benchmarks) -> Scores:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    bench = setting.bench.of(who)
    adapter = bench.versions[who]
    as_chat: dict[str, Any] = {}
    if wanted.apply_chat_template:
        as_chat = {"apply_chat_template": True, "system_instruction": setting.systems.get(who, setting.system)}
    with contextlib.redirect_stderr(io.StringIO()):  # its bars, which would lie across ours
        found = simple_evaluate(
            model=HFLM(
                pretrained=str(bench.base.folder),
                peft=str(adapter) if adapter is not None else None,
                dtype=bench.base.dtype,
                device=str(bench.model.device),
                batch_size=_BATCH,
            ),
            tasks=list(wanted.tasks),
            task_manager=TaskManager(include_path=str(wanted.include_path) if wanted.include_path else None),
            num_fewshot=wanted.num_fewshot,
            limit=wanted.limit,
            bootstrap_iters=0,  # the intervals are ours
            **as_chat,
        )
    scores = {}
    for task, samples in found["samples"].items():
        first, better = samples[0], found["higher_is_better"][task]
        score = next((m for m in first["metrics"] if better.get(m) and isinstance(first[m], (int, float))), None)
        if score is None:
            raise ValueError(f"{task} gives single questions no score of which more is better")
        scores[task] = score, [float(s[score]) for s in samples if s["filter"] == first["filter"]]
    return scores


def _in_words(values: list[float]) -> str:
    return in_words(mean_ci(values, higher_is_better=True).to_json())


def _unavailable(why: str) -> Finding:
    return Finding(metrics={}, unavailable={METRIC: why})
