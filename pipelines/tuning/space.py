"""The YAML's space as Optuna's distributions, and back to full parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_WHOLE = {"r", "per_device_train_batch_size"}


def distributions(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """A distribution for each dimension that is searched; single values are fixed and left out."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for name, value in space.items():
        if isinstance(value, Mapping):
            kind = IntDistribution if name in _WHOLE else FloatDistribution
            found[name] = kind(value["low"], value["high"], log=value["log"])
        elif isinstance(value, list) and len(value) > 1:
            found[name] = CategoricalDistribution([_text(choice) for choice in value])
    return found


def parameters(space: Mapping[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial trains with: the drawn values, and the fixed ones of the rest."""
    full: dict[str, Any] = {}
    for name, value in space.items():
        if name in drawn:
            full[name] = _value(drawn[name])
        else:
            full[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return full


def drawable(space: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that this space can draw, as Optuna wants it: for warm starts."""
    found = {}
    for name, distribution in distributions(space).items():
        value = _text(params.get(name))
        try:
            if value is not None and distribution._contains(distribution.to_internal_repr(value)):
                found[name] = value
        except (ValueError, TypeError):  # a value of another kind than the dimension's
            continue
    return found


def typical(space: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in the middle of the space: what a trial of it costs."""
    middle = {}
    for name, value in space.items():
        if isinstance(value, Mapping):
            between = math.sqrt(value["low"] * value["high"]) if value["log"] else (value["low"] + value["high"]) / 2
            middle[name] = round(between) if name in _WHOLE else between
        else:
            middle[name] = value[len(value) // 2] if isinstance(value, list) else value
    return middle


def _text(choice: Any) -> Any:
    """Optuna's choices are scalars; a list of module names becomes its JSON."""
    return json.dumps(sorted(choice)) if isinstance(choice, list) else choice


def _value(drawn: Any) -> Any:
    return json.loads(drawn) if isinstance(drawn, str) and drawn.startswith("[") else drawn
