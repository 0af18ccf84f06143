"""The YAML's space as Optuna's distributions, and configurations drawn from it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from infra.errors import UsageError
from pipelines.config_space import KINDS, Number, branches, drawn_from, order
from pipelines.tuning.defaults import FIXED
from registry import bases

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_GROUPS = ("attention", "mlp", "all-linear", "all", "top_half")
Suggest = Callable[[str, "BaseDistribution"], Any]


def check_parts(space: Mapping[str, Any], base: bases.Base) -> None:
    """Raises UsageError for names of modules, or numbers of layers, that a space has and the base has not. What
    depends on another dimension is not looked at."""
    modules = bases.modules(base)
    layers = {int(part) for name in modules for part in name.split(".") if part.isdigit()}
    for name in _choices(space.get("target_modules")):
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules if module.endswith("_proj")})
            raise UsageError(
                f"target_modules: {base.id} has no module {str(name)[:80]!r}.",
                hint=f"There are {', '.join(known)}." if known else "Such as attention or all-linear.",
            )
    for number in _choices(space.get("layers_to_transform")):
        if number not in layers:
            raise UsageError(
                f"layers_to_transform: {base.id} has no layer {number}; it has 0 to {max(layers, default=0)}.",
                hint="Mend tuning.space.",
            )


def _choices(value: Any) -> list[Any]:
    """The single modules or layers of all choices of a dimension."""
    if isinstance(value, list):
        return [one for choice in value for one in _choices(choice)]
    return [] if value is None or isinstance(value, dict) or value in _GROUPS else [value]


def draw(space: Mapping[str, Any], suggest: Suggest) -> dict[str, Any]:
    """A configuration that can be trained: a value for every dimension.

    `suggest` is asked once for each dimension that has a choice left, in `order`, such as Optuna's ``trial._suggest``.
    A name has one distribution for ever: the branches of a condition have names of their own, and a dimension that
    what was drawn before leaves one choice is not asked for. Raises ValueError when it leaves none, which no space
    that a pipeline file was accepted with can do.
    """
    full = FIXED | dict(space)  # a study that is older than these dimensions goes on without them
    params: dict[str, Any] = {}
    for name in order(full):
        label, plain = drawn_from(name, full[name], params)
        distribution = _distribution(name, plain)
        params[name] = _only(plain) if distribution is None else _value(suggest(label, distribution))
    return params


def distributions(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Every distribution that a draw may ask for, by Optuna's name; single values are fixed and left out."""
    return {
        label: distribution
        for name in order(space)
        for label, plain in branches(name, space[name]).items()
        if (distribution := _distribution(name, plain)) is not None
    }


def drawable(space: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that this space can draw, as Optuna wants it: for warm starts."""
    full, wanted = FIXED | dict(space), FIXED | dict(params)
    found: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for name in order(full):
        try:
            label, plain = drawn_from(name, full[name], known)
        except KeyError:  # Optuna is to draw what it depends on
            continue
        distribution = _distribution(name, plain)
        if distribution is None:
            known[name] = _only(plain)
            continue
        value = _text(wanted.get(name))
        try:
            if value is not None and distribution._contains(distribution.to_internal_repr(value)):
                found[label], known[name] = value, _value(value)
        except (ValueError, TypeError):  # a value of another kind than the dimension's
            continue
    return found


def every(space: Mapping[str, Any], most: int) -> list[dict[str, Any]] | None:
    """All configurations, each as `draw` gives it, always in the same order; None where a dimension has no end of
    values, or there are more than `most`."""
    full = FIXED | dict(space)
    found: list[dict[str, Any]] = [{}]
    for name in order(full):
        longer: list[dict[str, Any]] = []
        for params in found:
            values = _every(name, drawn_from(name, full[name], params)[1])
            if values is None or len(longer) + len(values) > most:
                return None
            longer += [params | {name: value} for value in values]
        found = longer
    return found


def typical(space: Mapping[str, Any], wanted: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
    """A configuration in the middle of the space: what a trial of it costs. One that is `wanted`, if another method or
    start of the adapter makes it so."""
    middle = draw(space, lambda _, distribution: _middle(distribution))
    if wanted(middle):
        return middle
    decide = {"use_dora", "init_lora_weights"}
    for form in [space.get(name) for name in decide]:  # and what these hang on
        decide |= set(form["when"]) if isinstance(form, Mapping) and "when" in form else set()
    known = distributions({name: form for name, form in space.items() if name in decide})
    choices = {label: list(distribution.choices) for label, distribution in known.items()}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        params = draw(space, lambda label, other, chosen=chosen: chosen.get(label, _middle(other)))  # type: ignore[misc]
        if wanted(params):
            return params
    return middle


def _middle(distribution: Any) -> Any:
    if choices := getattr(distribution, "choices", None):
        return choices[len(choices) // 2]
    low, high = distribution.low, distribution.high
    middle = math.sqrt(low * high) if distribution.log else (low + high) / 2
    return round(middle) if isinstance(low, int) else middle


def layers(wanted: str | list[int], count: int) -> list[int] | None:
    """PEFT's ``layers_to_transform`` for a base of so many layers; None for all of them. The top half are those
    nearest the output, the middle one of an odd number among them.

    PEFT takes layer numbers only together with a list of module names, so not with the name all-linear, and passes
    over numbers that the base does not have. Raises ValueError for those.
    """
    if wanted == "all":
        return None
    if wanted == "top_half":
        return list(range(count // 2, count))
    numbers = [int(number) for number in wanted]
    if beyond := [number for number in numbers if number >= count]:
        raise ValueError(f"layers_to_transform has layer {beyond[0]}, but this base's layers are 0 to {count - 1}")
    return numbers


def _distribution(name: str, plain: Any) -> BaseDistribution | None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(plain, Mapping):
        kind = KINDS[name]
        ranged = IntDistribution if isinstance(kind, Number) and kind.whole else FloatDistribution
        return ranged(plain["low"], plain["high"], log=plain["log"])
    if isinstance(plain, list) and len(plain) > 1:
        return CategoricalDistribution([_text(choice) for choice in plain])
    return None


def _every(name: str, plain: Any) -> list[Any] | None:
    """All values of a dimension; None where they have no end."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    distribution = _distribution(name, plain)
    if distribution is None:
        return [_only(plain)]
    if isinstance(distribution, CategoricalDistribution):
        return [_value(choice) for choice in distribution.choices]
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1))
    return None


def _only(plain: Any) -> Any:
    return plain[0] if isinstance(plain, list) else plain


def _text(choice: Any) -> Any:
    """Optuna's choices are scalars; a list of module names or layers becomes its JSON."""
    return json.dumps(sorted(choice)) if isinstance(choice, list) else choice


def _value(drawn: Any) -> Any:
    return json.loads(drawn) if isinstance(drawn, str) and drawn.startswith("[") else drawn
