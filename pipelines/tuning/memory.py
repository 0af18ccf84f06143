"""What a worker may use of the machine's memory, and the limit under which it errs instead of being killed."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from infra.settings import get_settings

OUT_OF_MEMORY = "out of memory"  # what the cause of a trial that does not fit begins with
_USED = 0.8  # of the machine, by all workers of a search together
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def share(workers: int) -> int:
    """Bytes that one of so many workers on this machine may use: the setting, or its part of what there is."""
    if (wanted := get_settings().worker_memory_gb) is not None:
        return round(wanted * 1e9)
    total = psutil.virtual_memory().total
    if _CGROUP.is_file() and (limit := _CGROUP.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return round(total * _USED / max(1, workers))


def used() -> int:
    """Bytes of memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def confine(most: int) -> None:
    """From now on allocations beyond `most` bytes fail in this process, as a MemoryError or torch's RuntimeError, and
    the kernel need not choose whom to kill. On Linux only: elsewhere no limit counts private memory alone."""
    if sys.platform != "linux":
        return
    import resource

    taken = int(psutil.Process().memory_info().data)  # what the limit counts: address space, more than what is used
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = taken + max(0, most - used())
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
