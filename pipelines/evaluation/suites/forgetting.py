"""Forgetting: what the base could do that has nothing to do with the team's rows, can the version still do it?

Measured by loss, since a small model is seldom right word for word: of right answers to everyday instructions, and of
plain prose. Both stand in general.jsonl and were written for this suite.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.evaluation.answers import Case
from pipelines.evaluation.catalogue import SUITES
from pipelines.evaluation.comparison import means
from pipelines.evaluation.hosted import NOT_APPLICABLE
from pipelines.evaluation.suites import Finding, Setting
from registry.datasets import make_row


def own_texts() -> list[str]:
    return [value.get("text") or value["prompt"] for value in _general()]


def measure(setting: Setting) -> Finding:
    if "candidate" not in setting.bench.versions:
        return Finding(metrics={}, unavailable=dict.fromkeys(SUITES["forgetting"], NOT_APPLICABLE["loss"]))
    instructions, texts = [], []
    for value in _general():
        if "text" in value:
            texts.append(_prose(setting, value["text"]))
            continue
        turns = [{"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["completion"]}]
        # Without the version's own system prompt, which asks for something else
        instructions += setting.bench.cases([make_row(turns)], system=None, max_tokens=0)
    setting.say("loss of general text")
    measured = {
        name: setting.bench.losses(cases)
        for name, cases in (("general_instructions_loss", instructions), ("general_text_loss", texts))
        if cases
    }
    return Finding(metrics=means(measured))


def _general() -> list[dict[str, str]]:
    """``{"prompt", "completion"}`` of an instruction, ``{"text"}`` of prose."""
    file = Path(__file__).with_name("general.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _prose(setting: Setting, text: str) -> Case:
    """Text without any template: all but its first token is predicted."""
    ids = setting.bench.tokenizer(text, add_special_tokens=False)["input_ids"]
    row = make_row([{"role": "assistant", "content": text}])
    return Case(row=row, whole=tuple(ids), prompt_length=1)
