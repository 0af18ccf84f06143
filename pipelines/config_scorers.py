"""What a pipeline file says about scorers that need something of the user's: a JSON schema, a classifier, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo

from pipelines.config_address import Section, absolute


def _schema(value: Any, info: ValidationInfo) -> Any:
    """A JSON Schema as a file's path or as it is; sound, and without references that would need a network."""
    if isinstance(value, str):
        path = absolute(value, info)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); give a JSON Schema's file") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError("must be a JSON Schema, or the path of one, such as answer.schema.json")
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    try:
        validator_for(value, default=Draft202012Validator).check_schema(value)
    except SchemaError as error:
        raise ValueError(f"is no JSON Schema: {error.json_path}: {error.message[:200]}") from error
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(value))
    for reference in _references(value):
        if not reference.startswith("#"):
            raise ValueError(f"refers to {reference[:200]}, and nothing is fetched; put it under $defs")
        try:
            resolver.lookup(reference)
        except Exception as error:  # referencing's own, of several families
            raise ValueError(f"refers to {reference[:200]}, which is not in it") from error
    return value


def _references(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        own = [value[key] for key in ("$ref", "$dynamicRef") if isinstance(value.get(key), str)]
        return own + [ref for inner in value.values() for ref in _references(inner)]
    return [ref for inner in value for ref in _references(inner)] if isinstance(value, list) else []


def _there(value: Any, info: ValidationInfo) -> Path:
    """A path; of a file that is read now it must be there. A run's settings, read back later, may have outlived it."""
    path = absolute(value, info)
    if info.context and not path.exists():
        raise ValueError(f"there is no {path}; mend the path")
    return path


Schema = Annotated[dict[str, Any], BeforeValidator(_schema)]


class Toxicity(Section):
    """Who calls an answer toxic: a transformers text-classification model in a folder, by its `label` (at a probability
    of one half). `labelled` is a JSONL file of ``{"text", "toxic"}`` by people; without it, our own small set."""

    model: Annotated[Path, BeforeValidator(_there)]
    label: str = Field(default="toxic", min_length=1)
    labelled: Annotated[Path, BeforeValidator(_there)] | None = None


class Benchmarks(Section):
    """Public benchmarks by the names that lm-evaluation-harness gives its `tasks`, and the folder of one's own; of each
    the first `limit` questions, after `num_fewshot` examples (the task's own number unless given)."""

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    include_path: Annotated[Path, BeforeValidator(_there)] | None = None
    limit: int = Field(default=100, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
