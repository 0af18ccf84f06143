"""PipelineConfig: one YAML file is one pipeline. Every field has a sound default but `model`, `base` and `data`.

Names are PEFT's and TRL's where they have one. `load` reports every problem at once, each as
``file:line: field: what is wrong; what to do``; `check` then looks at the data files themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from infra.storage import file_digest, text_digest
from pipelines import config_file
from pipelines.config_address import HostedVersion, Section
from pipelines.config_evaluation import Evaluation, Gate
from pipelines.config_file import Problem, Source
from pipelines.config_serving import Monitoring, Retrain, Rollout
from pipelines.config_space import Space, did_you_mean, refused
from pipelines.tuning.objectives import MEASURES
from registry.names import MODEL_NAME

# A chat address tells no probabilities, and its load is not ours to set
NOT_OF_HOSTED = ("loss", "perplexity", "tokens_per_second", "p95_latency_at_load_ms")
BUILTIN_BASES = ("builtin:smollm2-135m", "builtin:tiny")


def _path(value: Any, info: ValidationInfo) -> Path:
    """A path as written, made absolute: relative ones start at the file's folder."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError(f"must be a path such as train.jsonl, not {value!r}")
    if str(value).startswith("hf:"):
        raise ValueError("hub data sets are not read yet; export the rows to a JSONL file")
    if Path(value).suffix.lower() not in (".jsonl", ".ndjson", ".csv"):
        raise ValueError(f"{value} is neither .jsonl nor .csv; export the rows to a JSONL file")
    return Path((info.context or {}).get("folder", Path.cwd()), Path(value).expanduser()).absolute()


def _count(value: Any) -> Any:
    return value["count"] if isinstance(value, dict) and value.keys() == {"count"} else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


DataPaths = Annotated[tuple[Annotated[Path, BeforeValidator(_path)], ...], BeforeValidator(_listed)]

Licence = Annotated[str, Field(min_length=1, max_length=200)]


class BaseModelSection(Section):
    """The base: a hub id, a folder, builtin:smollm2-135m or builtin:tiny."""

    path: str
    revision: str = "main"

    @field_validator("path")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        if value.startswith("builtin:"):
            if value not in BUILTIN_BASES:
                raise ValueError(f"{value!r} is not built in; {did_you_mean(value, BUILTIN_BASES)}")
            return value
        folder = Path((info.context or {}).get("folder", Path.cwd()), Path(value).expanduser()).absolute()
        if folder.is_dir():
            return str(folder)
        if value.startswith((".", "/", "~")):
            raise ValueError(f"there is no folder {folder}; give a model's folder, a hub id or builtin:tiny")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", value):
            raise ValueError(f"{value!r} is no hub id (owner/name) and no folder; or use {BUILTIN_BASES[0]}")
        return value


class Quality(Section):
    """What makes a row good enough. `max_bad` is the share of malformed rows above which nothing is used."""

    dedup: Literal["exact", "near", "none"] = "near"
    pii: Literal["redact", "keep", "drop"] = "redact"
    max_tokens: int = Field(default=512, ge=8, le=131_072)
    max_bad: float = Field(default=0.05, ge=0, le=1)


class SplitShares(Section):
    """Shares of `train` kept for what has no file of its own."""

    validation: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)
    seed: int = Field(default=0, ge=0, lt=2**31)


class Data(Section):
    """The team's examples. `test` and `validation` are split from `train` where they have no file of their own.
    `licence` is all files', or each one's by its name. So many `canaries`, made-up secrets, are put among the rows to
    learn from, for the suite `privacy` to ask for."""

    train: DataPaths = Field(min_length=1)
    validation: DataPaths = ()
    test: DataPaths = ()
    licence: Licence | dict[str, Licence] | None = None
    quality: Quality = Quality()
    split: SplitShares = SplitShares()
    canaries: int = Field(default=0, ge=0, le=100)

    def licence_of(self, path: Path) -> str | None:
        """What the file says of a data file's licence."""
        return self.licence.get(path.name) if isinstance(self.licence, dict) else self.licence

    @field_validator("licence")
    @classmethod
    def _names_files(cls, value: Any, info: ValidationInfo) -> Any:
        names = [path.name for split in ("train", "validation", "test") for path in info.data.get(split, ())]
        for name in value if isinstance(value, dict) else ():
            if name not in names:
                raise ValueError(f"there is no data file {name!r}; {did_you_mean(name, names)}")
        return value


class Prompt(Section):
    """`system` stands before every conversation that has no system message of its own, in training and serving."""

    system: str | None = Field(default=None, max_length=20_000)


class Generation(Section):
    """How a served version answers when a request does not say."""

    max_tokens: int = Field(default=64, ge=1, le=8_192)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)


class Budget(Section):
    """The search stops at the first of these that is reached."""

    max_minutes: float | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    max_usd: float | None = Field(default=None, gt=0)


class Pruning(Section):
    """Successive halving: `rungs` stages, after each of which the best 1/`reduction` of a group goes on, and no fewer
    than `finalists`: who leads halfway, at a rate that is still high, is often not who leads in the end."""

    reduction: int = Field(default=3, ge=2, le=16)
    rungs: int = Field(default=3, ge=1, le=10)
    finalists: int = Field(default=2, ge=1, le=64)


class Pick(Section):
    """Which of the Pareto set wins: of the trials with a loss at most `within` (a share) above the best, the one with
    the least of `then`."""

    within: float = Field(ge=0, le=1)
    then: str


class Limit(Section):
    """The most of a measure that a trial may have."""

    at_most: float = Field(ge=0)


class Tuning(Section):
    """The search. A trial trains `max_steps` steps at most; without it, `num_train_epochs` passes over the rows by
    batches of the middle of the space. With `warm_start` it begins with what was best in the model's last studies, and
    with `start_from: champion` each trial with the weights of the version that serves, where that is of the same base.
    `workers` 0 is one a GPU or core (or TUNESMITH_SEARCH_WORKERS). `adapters_per_pass`: how many trials a worker
    trains in one pass over the base; 0 measures it at the study's start. `validation_rows` bounds the rows that
    trials are compared on (a seeded sample); None is all. With the method "prompt" there is no search: the version is
    the base with the file's system prompt. `objectives`, `pick` and `constraints` choose the winner,
    by the measures of tuning/objectives.py; loss comes first, since trials are drawn and stopped by it."""

    method: Literal["lora", "prompt"] = "lora"
    trials: int = Field(default=16, ge=1, le=10_000)
    budget: Budget = Budget()
    space: Space = Space()
    objectives: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ("loss",)
    pick: Pick | None = None
    constraints: dict[str, Limit] = Field(default_factory=dict)
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    num_train_epochs: float = Field(default=3.0, gt=0, le=1_000)
    pruning: Pruning = Pruning()
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(default=0, ge=0, lt=2**31)
    warm_start: bool = True
    start_from: Literal["base", "champion"] = "base"
    workers: int = Field(default=0, ge=0, le=1_024)
    adapters_per_pass: int = Field(default=0, ge=0, le=64)
    validation_rows: int | None = Field(default=None, ge=16)

    @field_serializer("space")
    def _as_written(self, space: Space) -> dict[str, Any]:
        """Without its defaults, for those are of a base's size, which is not known yet."""
        return space.model_dump(mode="json", exclude_unset=True)

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in MEASURES:
                raise ValueError(f"{name!r} is no objective; {did_you_mean(name, MEASURES)}")
        if value[:1] != ("loss",):
            raise ValueError("must begin with loss, by which trials are drawn and stopped; add it in front")
        return tuple(dict.fromkeys(value))

    @field_validator("constraints")
    @classmethod
    def _constraints(cls, value: dict[str, Limit]) -> dict[str, Limit]:
        unknown = [(name, f"is no measure; {did_you_mean(name, MEASURES)}") for name in value if name not in MEASURES]
        if unknown:
            raise refused(unknown)
        return value

    @model_validator(mode="after")
    def _picks_an_objective(self) -> Tuning:
        others = self.objectives[1:]
        if self.pick is not None and self.pick.then not in others:
            what = f"use {' or '.join(others)}" if others else "add it to objectives"
            raise refused([("pick", f"then: {self.pick.then!r} is not an objective beside loss; {what}")])
        return self


class PipelineConfig(Section):
    """A whole pipeline. Paths are absolute."""

    model: str
    base: Annotated[
        BaseModelSection, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)
    ]
    data: Data
    prompt: Prompt = Prompt()
    hosted: HostedVersion | None = None
    generation: Generation = Generation()
    tuning: Tuning = Tuning()
    evaluation: Evaluation = Evaluation()
    gates: tuple[Gate, ...] = (
        Gate(metric="loss", against="base", must="better"),
        Gate(metric="loss", against="champion", must="not_worse", margin=0.05),
    )
    on_underpowered: Literal["refuse", "ask"] = "refuse"
    approvals: Annotated[int, BeforeValidator(_count), Field(ge=0, le=100)] = 0
    promote: Literal["when_gates_pass", "canary", "manual"] = "when_gates_pass"
    rollout: Rollout = Rollout()
    retrain: Retrain | None = None
    monitoring: Monitoring = Monitoring()

    _source: Source | None = PrivateAttr(default=None)

    @field_validator("model")
    @classmethod
    def _name(cls, value: str) -> str:
        if not MODEL_NAME.fullmatch(value):
            raise ValueError(f"{value!r} is no model name; use small letters, digits and hyphens, at most 63")
        return value

    @field_validator("gates")
    @classmethod
    def _measured(cls, value: tuple[Gate, ...], info: ValidationInfo) -> tuple[Gate, ...]:
        evaluation: Evaluation | None = info.data.get("evaluation")  # None when it has problems of its own
        for gate in value:
            if evaluation is not None and (message := evaluation.lacks(gate.metric)):
                raise ValueError(message)
        return value

    @model_validator(mode="after")
    def _without_training(self) -> PipelineConfig:
        """A prompt on the base, or a hosted model, is not searched for, nor trained again."""
        if self.trains:
            return self
        what = "method: prompt" if self.hosted is None else "a hosted model"
        plain = (Tuning() if self.hosted is not None else Tuning(method="prompt")).model_dump()
        unused = [f"tuning.{name}" for name, value in self.tuning.model_dump().items() if value != plain[name]]
        unused += ["retrain"] if self.retrain is not None else []
        found = [("tuning", f"{what} trains nothing; leave {name} out") for name in unused]
        if self.hosted is None and not self.prompt.system:
            found.append(("prompt", "method: prompt is the base with a prompt; add system: and the prompt"))
        for gate in self.gates if self.hosted is not None else ():
            if gate.metric in NOT_OF_HOSTED:
                found.append(("gates", f"a hosted model has no {gate.metric}; gate on another metric, as token_f1"))
        if found:
            raise refused(found)
        return self

    @property
    def trains(self) -> bool:
        """Whether a version of this file has an adapter of its own."""
        return self.hosted is None and self.tuning.method != "prompt"

    @property
    def method(self) -> str:
        """How a version of this file is made."""
        return "hosted" if self.hosted is not None else self.tuning.method

    def jsonable(self) -> dict[str, Any]:
        """The whole configuration as plain JSON values; `PipelineConfig.model_validate` reads it back."""
        return self.model_dump(mode="json")

    def problem(self, field: config_file.Field, message: str) -> Problem:
        """A problem at a field, with the line of the file it was loaded from."""
        if self._source is None:
            return Problem(where="", field=field, message=message)
        return self._source.problem(field, message)

    def fingerprint(self) -> str:
        """A digest of the settings and of every data file's content: equal for equal work, wherever it stands.

        Raises ConfigError when a data file is gone.
        """
        check_files(self)
        values = self.jsonable()
        for name in ("train", "validation", "test"):
            values["data"][name] = [file_digest(path) for path in getattr(self.data, name)]
        values["evaluation"] = self.evaluation.by_content()
        return text_digest(orjson.dumps(values, option=orjson.OPT_SORT_KEYS).decode())


def load(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline file; overrides (``tuning.trials=4``, the value in YAML) win over it.

    Raises ConfigError with every problem of the file at once.
    """
    source = config_file.read(path, overrides)
    problems = list(source.problems)
    config: PipelineConfig | None = None
    try:
        config = PipelineConfig.model_validate(source.values, context={"folder": path.absolute().parent})
    except ValidationError as error:
        found = error.errors(include_url=False)
        inner = {e["loc"][:n] for e in found for n in range(len(e["loc"]))}
        # A list whose only entry is wrong is not also too short
        problems += [_explain(source, dict(e)) for e in found if e["type"] != "too_short" or e["loc"] not in inner]
    if problems or config is None:
        raise config_file.failure(path, problems)
    config._source = source
    return config


def check_files(config: PipelineConfig) -> None:
    """Raises ConfigError naming every data file that cannot be read, at its line."""
    problems = []
    for name in ("train", "validation", "test"):
        paths: tuple[Path, ...] = getattr(config.data, name)
        for index, path in enumerate(paths):
            field: config_file.Field = ("data", name) if len(paths) == 1 else ("data", name, index)
            if message := _unreadable(path):
                problems.append(config.problem(field, message))
    for section, labelled in config.evaluation.labelled:
        if message := _unreadable(labelled):
            problems.append(config.problem(("evaluation", section, "labelled"), message))
    if problems:
        raise config_file.failure(_path_of(config), problems)


def _unreadable(path: Path) -> str | None:
    """Why a data file cannot be read, and what to do; None when it can."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            return f"{path} is not a file; give a JSONL or CSV file"
        if size == 0:
            return f"{path} is empty; put one example on each line"
        path.open("rb").close()
    except ValueError:  # a NUL
        return f"{str(path)!r} cannot be the name of a file; mend it"
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no file {path}; mend the path, or make the file"
    except OSError as error:  # closed to this user, or in a folder that is
        return f"{path} cannot be read ({error.strerror}); let this user read it and its folders"
    return None


def check(config: PipelineConfig) -> dict[str, Any]:
    """Look at the data files: there, readable, their first rows of a known form.

    Returns what was seen: ``{"files": [{"path", "split", "form", "rows_read", "rows_bad"}]}``. Raises ConfigError
    with every problem at once.
    """
    from pipelines.data import sources
    from pipelines.evaluation.suites.judge import read_labelled

    check_files(config)
    problems, files = [], []
    if (judge := config.evaluation.judge) is not None and judge.labelled is not None:
        try:
            read_labelled(judge.labelled)
        except ValueError as error:
            message = f"{judge.labelled.name}: {error}"
            problems.append(config.problem(("evaluation", "judge", "labelled"), message))
    for name in ("train", "validation", "test"):
        paths: tuple[Path, ...] = getattr(config.data, name)
        for index, path in enumerate(paths):
            field: config_file.Field = ("data", name) if len(paths) == 1 else ("data", name, index)
            head = sources.peek(path)
            files.append(
                {
                    "path": str(path),
                    "split": name,
                    "form": head.form,
                    "rows_read": head.good + len(head.bad),
                    "rows_bad": len(head.bad),
                }
            )
            for bad in (
                head.bad[:3] if len(head.bad) > config.data.quality.max_bad * (head.good + len(head.bad)) else []
            ):
                problems.append(config.problem(field, f"{path.name}:{bad.line}: {bad.reason}"))
    if problems:
        raise config_file.failure(_path_of(config), problems)
    return {"files": files}


def _path_of(config: PipelineConfig) -> Path:
    return config._source.path if config._source else Path("the configuration")


_WORDS = {
    "missing": "is missing; add it",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of settings",
    "too_short": "must have at least one entry",
}


def _explain(source: Source, error: Mapping[str, Any]) -> Problem:
    """One pydantic error in the words of the file."""
    at, kind, given = tuple(error["loc"]), error["type"], error.get("input")
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        message = f"is not a known key; {did_you_mean(str(at[-1]), _keys(at[:-1]))}"
    elif kind == "value_error":
        message = str(context["error"])
    elif kind == "literal_error":
        message = f"{given!r} is not known; use {context['expected']}"
    elif kind in _WORDS:
        shown = "" if kind == "missing" or isinstance(given, dict | list) else f", not {given!r}"
        message = _WORDS[kind] + shown
    else:
        message = f"{error['msg'].replace('Input should', 'must')}, not {given!r}"
    return source.problem(at, message)


def _keys(at: tuple[str | int, ...]) -> list[str]:
    """The keys that a section may hold."""
    section: type[BaseModel] = PipelineConfig
    for part in at:
        if isinstance(part, str) and part in section.model_fields:  # not the keys of a mapping such as constraints
            section = _section(section.model_fields[part].annotation) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)
