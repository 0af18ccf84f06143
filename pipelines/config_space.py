"""The `tuning.space` section: what is searched, and what values make sense.

A list is a choice, ``{low, high, log}`` a range, a single value is fixed, and ``{when: {use_rslora: true}, then: ...,
else: ...}`` is one of two such forms, by what another dimension drew. Names are PEFT's (LoraConfig) and transformers'
(TrainingArguments).

Dimensions are drawn in one order, that of KINDS, but what a condition names before what has the condition. What PEFT
could not train rightly together (`clash`) is never drawn: a choice that does not go with what was drawn before is left
out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, model_validator

from pipelines.tuning.defaults import SMALL, defaults_for


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number from `low` to `high`, whole or not."""

    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Name:
    """One of some names, of which true and false may be some."""

    names: tuple[str | bool, ...]


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Which linear layers get an adapter: a name for a group of them, or a list of module names."""

    groups: tuple[str, ...] = ("attention", "mlp", "all-linear")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Which of the stacked layers get adapters: all, the half nearest the output, or a list of numbers from 0."""

    groups: tuple[str, ...] = ("all", "top_half")


Kind = Number | Name | Modules | Layers

SERVED_RANK = 256  # the highest rank that our engine serves

KINDS: Mapping[str, Kind] = {
    "r": Number(low=1, high=SERVED_RANK, whole=True),
    "use_rslora": Name(names=(False, True)),
    "use_dora": Name(names=(False, True)),
    "init_lora_weights": Name(names=(True, "pissa")),
    "lora_alpha": Number(low=0.1, high=4096),
    "lora_dropout": Number(low=0, high=0.9),
    "learning_rate": Number(low=1e-8, high=1),
    "lr_scheduler_type": Name(names=("linear", "cosine", "constant")),
    "warmup_ratio": Number(low=0, high=0.9),
    "weight_decay": Number(low=0, high=1),
    "max_grad_norm": Number(low=1e-3, high=1000),
    "target_modules": Modules(),
    "layers_to_transform": Layers(),
    "per_device_train_batch_size": Number(low=1, high=1024, whole=True),
    "gradient_accumulation_steps": Number(low=1, high=1024, whole=True),
}


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """``did you mean 'trials'?``, or the list of what there is."""
    names = list(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"


def refused(found: Sequence[tuple[str, str]]) -> ValidationError:
    """Problems of single fields, as (field, message), for a validator of the whole section to raise."""
    return ValidationError.from_exception_data(
        "section",
        [
            {"type": "value_error", "loc": (field,), "input": None, "ctx": {"error": ValueError(message)}}
            for field, message in found
        ],
    )


def clash(params: Mapping[str, Any]) -> str | None:
    """Why these values, a whole configuration's or some of them, cannot be trained together; None when they can.

    Tried with PEFT 0.21.2. PEFT makes a PiSSA adapter with DoRA, but the plain adapter that it saves of it answers
    otherwise than what was trained. With dropout, PiSSA drops parts of the base itself, not of a change to it (Meng et
    al. 2024 use none).
    """
    if params.get("init_lora_weights") != "pissa":
        return None
    if params.get("use_dora"):
        return "init_lora_weights: pissa does not go with use_dora: true, since PEFT saves no plain adapter of both"
    if params.get("lora_dropout"):
        return "init_lora_weights: pissa needs lora_dropout: 0, since dropout would drop parts of the base itself"
    if params.get("r", 0) > SERVED_RANK // 2:
        return f"init_lora_weights: pissa needs r of {SERVED_RANK // 2} at most, since it is saved as LoRA of twice r"
    return None


def largest_rank(space: Mapping[str, Any]) -> int:
    """The highest rank that an adapter of a space has when it is saved, by which it is served: PiSSA's is doubled."""
    ranks = [int(rank) for form in branches("r", space["r"]).values() for rank in _values(form)]
    starts = [start for form in branches("i", space["init_lora_weights"]).values() for start in _values(form)]
    doubled = [2 * rank for rank in ranks if rank <= SERVED_RANK // 2] if "pissa" in starts else []
    return max([*ranks, *doubled])


def order(space: Mapping[str, Any]) -> list[str]:
    """The dimensions of a space in the order in which they are drawn."""
    found: list[str] = []
    for name in KINDS:
        if name not in space:
            continue
        before = space[name]["when"] if _is_conditional(space[name]) else ()
        found += [each for each in (*before, name) if each in space and each not in found]
    return found


def branches(name: str, form: Any) -> dict[str, Any]:
    """The plain forms of a dimension under the names that Optuna knows them by, which tell conditions apart:
    ``lora_alpha[use_rslora=true]``."""
    if not _is_conditional(form):
        return {name: form}
    ((other, value),) = form["when"].items()
    return {f"{name}[{other}={_shown(value)}]": form["then"], f"{name}[{other}!={_shown(value)}]": form["else"]}


def drawn_from(name: str, form: Any, params: Mapping[str, Any]) -> tuple[str, Any]:
    """Optuna's name and the plain form of a dimension, when `params` was drawn before it: the branch whose condition
    holds, without the choices that clash. At most one choice is left of a form that lost any.

    Raises KeyError when its condition was not drawn, ValueError when all of its choices clash.
    """
    (label, plain), *rest = branches(name, form).items()
    if rest:
        ((other, value),) = form["when"].items()
        if params[other] != value:
            label, plain = rest[0]
    possible = [value for value in _values(plain) if clash({**params, name: value}) is None]
    if not possible:
        raise ValueError(clash({**params, name: _values(plain)[0]}))
    return label, plain if len(possible) == len(_values(plain)) else possible[0]


def _is_conditional(form: Any) -> bool:
    return isinstance(form, Mapping) and "when" in form


def _values(plain: Any) -> list[Any]:
    """The choices of a plain form; of a range its ends, which clash where its inner values do."""
    if isinstance(plain, Mapping):
        return [plain["low"], plain["high"]]
    return list(plain) if isinstance(plain, list) else [plain]


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(str(item) for item in value)}]" if isinstance(value, list) else str(value)


def _dimension(value: Any, info: ValidationInfo) -> Any:
    name = info.field_name or ""
    if isinstance(value, Mapping) and {"when", "then", "else"} & set(value):
        return _conditional(name, value)
    return _plain(name, value)


def _conditional(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    form = "a condition is {when: {use_rslora: true}, then: [8, 16], else: [16, 32]}"
    if unknown := sorted(set(value) - {"when", "then", "else"}):
        raise ValueError(f"has the unknown key {unknown[0]!r}; {form}")
    if missing := [key for key in ("when", "then", "else") if key not in value]:
        raise ValueError(f"has no {missing[0]}; {form}")
    when = value["when"]
    if not isinstance(when, Mapping) or len(when) != 1:
        raise ValueError(f"when must name one other dimension and one of its choices; {form}")
    ((other, choice),) = when.items()
    if other == name:
        raise ValueError("depends on itself; name another dimension in when")
    if other not in KINDS:
        raise ValueError(f"when: {other!r} is not a dimension; {did_you_mean(str(other), KINDS)}")
    found: dict[str, Any] = {}
    for key, inner in (("when", choice), ("then", value["then"]), ("else", value["else"])):
        if isinstance(inner, Mapping) and {"when", "then", "else"} & set(inner):
            raise ValueError(f"{key} holds another condition; conditions are one level deep")
        try:
            found[key] = {other: _choice(KINDS[other], inner)} if key == "when" else _plain(name, inner)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return found


def _plain(name: str, value: Any) -> Any:
    kind = KINDS[name]
    if isinstance(value, Mapping):
        return _range(name, kind, value)
    if not isinstance(value, list | tuple):
        return _choice(kind, value)
    if not value:
        raise ValueError("is an empty list; give at least one choice")
    choices = [_choice(kind, item) for item in value]
    if any(item in choices[:index] for index, item in enumerate(choices)):
        raise ValueError("lists a choice twice; keep one of them")
    return choices


def _range(name: str, kind: Kind, value: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(kind, Number):
        raise ValueError("cannot be a range; give a list of choices")
    form = "a range is {low: 1, high: 9, log: true}"
    if unknown := sorted(set(value) - {"low", "high", "log"}):
        raise ValueError(f"has the unknown key {unknown[0]!r}; {form}")
    if not {"low", "high"} <= set(value):
        raise ValueError(f"needs both low and high; {form}")
    low, high, log = _choice(kind, value["low"]), _choice(kind, value["high"]), value.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false, not {log!r}; {form}")
    if not low < high:
        raise ValueError(f"low ({low:g}) must be under high ({high:g}); for one fixed value write {name}: {low:g}")
    if log and low <= 0:
        raise ValueError("a log range must begin above 0; raise low, or leave log out")
    return {"low": low, "high": high, "log": log}


def _choice(kind: Kind, value: Any) -> Any:
    if isinstance(kind, Number):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number, not {value!r}")
        if kind.whole and value != int(value):
            raise ValueError(f"must be a whole number, not {value!r}")
        if not kind.low <= value <= kind.high:
            raise ValueError(f"must be from {kind.low:g} to {kind.high:g}, not {value!r}")
        return int(value) if kind.whole else value
    if isinstance(kind, Modules) and isinstance(value, list | tuple):
        if value and all(isinstance(item, str) and re.fullmatch(r"\w[\w.]*", item) for item in value):
            return sorted(set(value))
        raise ValueError(f"{value!r} is not a list of module names, such as [q_proj, v_proj]")
    if isinstance(kind, Layers) and isinstance(value, list | tuple):
        if value and all(type(item) is int and 0 <= item < 1000 for item in value):
            return sorted(set(value))
        raise ValueError(f"{value!r} is not a list of layer numbers, which count from 0")
    names = kind.names if isinstance(kind, Name) else kind.groups
    if not any(type(value) is type(name) and value == name for name in names):  # 1 is not true
        hint = ""
        if isinstance(kind, Modules):
            hint = "; single modules are a list of their own: [[q_proj, v_proj]]"
        elif isinstance(kind, Layers):
            hint = "; single layers are a list of their own: [[20, 21]]"
        raise ValueError(f"{value!r} is not known; {did_you_mean(str(value), map(_shown, names))}{hint}")
    return value


Dimension = Annotated[Any, BeforeValidator(_dimension)]


class Space(BaseModel):
    """The dimensions. The defaults here are those of a small base; `full` gives those of a base's size. What the
    file says is in `model_fields_set`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: Dimension = SMALL["r"]
    use_rslora: Dimension = SMALL["use_rslora"]
    use_dora: Dimension = SMALL["use_dora"]
    init_lora_weights: Dimension = SMALL["init_lora_weights"]
    lora_alpha: Dimension = SMALL["lora_alpha"]
    lora_dropout: Dimension = SMALL["lora_dropout"]
    learning_rate: Dimension = SMALL["learning_rate"]
    lr_scheduler_type: Dimension = SMALL["lr_scheduler_type"]
    warmup_ratio: Dimension = SMALL["warmup_ratio"]
    weight_decay: Dimension = SMALL["weight_decay"]
    max_grad_norm: Dimension = SMALL["max_grad_norm"]
    target_modules: Dimension = SMALL["target_modules"]
    layers_to_transform: Dimension = SMALL["layers_to_transform"]
    per_device_train_batch_size: Dimension = SMALL["per_device_train_batch_size"]
    gradient_accumulation_steps: Dimension = SMALL["gradient_accumulation_steps"]

    @model_validator(mode="after")
    def _fits_together(self) -> Space:
        space = self.model_dump(mode="json")
        problems = [
            (name, problem)
            for name in order(space)
            if _is_conditional(space[name]) and (problem := self._condition(space, name))
        ]
        if not problems:
            problems = _never_drawn({name: space[name] for name in order(space)}, self.model_fields_set)
        if problems:
            raise refused(problems)
        return self

    def _condition(self, space: Mapping[str, Any], name: str) -> str | None:
        """What is wrong with the condition of a dimension."""
        ((other, value),) = space[name]["when"].items()
        # A default may be another one for another base
        if other not in self.model_fields_set:
            return f"depends on {other}, which is left out; add {other} with its choices to the space"
        if _is_conditional(space[other]):
            return f"depends on {other}, which has a condition itself; name a dimension without one"
        if isinstance(space[other], Mapping):
            return f"depends on {other}, which is a range; give {other} a list of choices"
        if value not in _values(space[other]):
            return f"{other} is never {_shown(value)} here; add it to {other}, or name one of its choices"
        return None

    def full(self, parameters: int) -> dict[str, Any]:
        """Every dimension, for a base of so many parameters: the file's where it has one, else the default for that
        size (`defaults_for`)."""
        return defaults_for(parameters) | self.model_dump(mode="json", exclude_unset=True)


def _never_drawn(space: Mapping[str, Any], named: Iterable[str]) -> list[tuple[str, str]]:
    """Dimensions that can run out of choices, and choices in the file (`named`) that always clash."""
    tried = [name for name in ("r", "use_dora", "init_lora_weights", "lora_dropout") if name in space]
    needed = {next(iter(space[name]["when"])) for name in tried if _is_conditional(space[name])}
    small = {name: space[name] for name in order(space) if name in needed or name in tried}
    try:
        outcomes = list(_outcomes(small, order(small), {}, {}))
    except _Stuck as stuck:
        return [(stuck.name, f"{stuck.reason}; take one of the two out, or make one depend on the other")]
    problems = []
    for name in [name for name in tried if name in named]:
        for label, plain in branches(name, small[name]).items():
            there = [params for params, labels in outcomes if labels[name] == label]
            for value in _values(plain):
                if there and all(params[name] != value for params in there):
                    reason = next(r for params in there if (r := clash(params | {name: value})))
                    problems.append((name, f"{_shown(value)} is never drawn: {reason}; take one of the two out"))
    return problems


class _Stuck(Exception):
    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason


def _outcomes(
    space: Mapping[str, Any], names: Sequence[str], params: dict[str, Any], labels: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Every configuration of a small space, ranges by their ends, with the names of the branches it came from."""
    if not names:
        yield params, labels
        return
    name, *rest = names
    try:
        label, plain = drawn_from(name, space[name], params)
    except ValueError as error:
        raise _Stuck(name, str(error)) from error
    for value in _values(plain):
        yield from _outcomes(space, rest, params | {name: value}, labels | {name: label})
