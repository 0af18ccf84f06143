"""What a version was made with: the interpreter and every installed package, as a lock that stands in its bundle."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def lock() -> dict[str, Any]:
    """``{"python", "machine", "packages": {name: version}}`` of this process; its digest is that of its canonical
    JSON. Two machines of one kind with the same packages have the same one."""
    packages = {
        str(each.metadata["Name"]).lower().replace("_", "-"): each.version
        for each in importlib.metadata.distributions()
        if each.metadata["Name"]
    }
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": dict(sorted(packages.items())),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, str | None]]:
    """What is not the same: ``{name: {"then", "now"}}``, None where there was no such package."""
    before, after = ({"python": e["python"], "machine": e["machine"], **e["packages"]} for e in (then, now))
    return {
        name: {"then": before.get(name), "now": after.get(name)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
