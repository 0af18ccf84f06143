"""Toxic or not, by a text-classification model of the user's, and how well that agrees with people.

The model is a folder that transformers' ``save_pretrained`` made: weights in safetensors, no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infra.storage import file_digest
from pipelines.config_scorers import Toxicity
from pipelines.evaluation.agreement import agreement

LABELLED = Path(__file__).parent / "suites" / "toxic.jsonl"
_BATCH, _LONGEST = 16, 512


class Unavailable(Exception):
    """The scorer cannot be used; the text says why."""


class Classifier:
    """Whether texts are toxic. `about` names the model, its weights' digest, and its agreement with a labelled set.

    Raises Unavailable when the model or the labelled set is not there or not of the kind that is needed.
    """

    def __init__(self, config: Toxicity | None) -> None:
        if config is None:
            raise Unavailable("no classifier is named (evaluation.toxicity)")
        self._model, self._tokenizer = _load(config.model)
        label = config.label.casefold()
        found = {str(name).casefold(): number for number, name in self._model.config.id2label.items()}
        if label not in found:
            raise Unavailable(f"{config.model} has no label {config.label!r}, but {', '.join(found)}")
        self._number = int(found[label])
        labelled = config.labelled or LABELLED
        try:
            agreed = agreement(labelled, lambda line: self([line["text"]])[0], "toxic")
        except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
            raise Unavailable(
                f'{labelled} cannot be used; each line must be {{"text": ..., "toxic": true or false}}, some of either'
            ) from error
        self.about: dict[str, Any] = {
            **agreed,
            "by": f"the classifier {config.model.name} (label {config.label})",
            "model": _digest(config.model),
        }

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        import torch

        found: list[bool] = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            encoded = self._tokenizer(batch, padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt")
            kept = {key: encoded[key] for key in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                logits = self._model(**kept).logits.float()
            # Labels that exclude each other share one whole; others, and a label alone, have each their own
            each = logits.shape[1] == 1 or self._model.config.problem_type == "multi_label_classification"
            share = logits.sigmoid() if each else logits.softmax(-1)
            found += (share[:, self._number] >= 0.5).tolist()
        return found


def _load(folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise Unavailable(f"there is no model in {folder}")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load: Callable[..., Any] = AutoModelForSequenceClassification.from_pretrained
    try:
        model = load(folder, local_files_only=True, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise Unavailable(f"{folder} is no text-classification model in safetensors: {str(error)[:200]}") from error
    return model, tokenizer


def _digest(folder: Path) -> list[str]:
    return [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
