"""What a worker may use of the machine's memory, or of its GPU's, and the limit under which it errs instead of being
killed."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from infra.settings import get_settings

OUT_OF_MEMORY = "out of memory"  # what the cause of a trial that does not fit begins with
DIED = "its worker died"  # and of one whose workers were killed, as they are where the machine's memory runs out
_USED = 0.8  # of the machine, by all workers of a search together
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def share(workers: int, device: str) -> int:
    """Bytes that one of so many workers on this machine, or on this one's GPU, may use: the setting, or its part of
    what there is. Where more are at work on the machine, guests say, it is a part of them all."""
    if (wanted := get_settings().worker_memory_gb) is not None:
        return round(wanted * 1e9)
    if device == "cuda":
        return round(_on_gpu() * _USED / max(1, workers))
    total = psutil.virtual_memory().total
    if _CGROUP.is_file() and (limit := _CGROUP.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return round(total * _USED / max(1, workers, _here()))


def _here() -> int:
    """Search workers on this machine now, this one among them; not those whose coordinator was killed, which end
    after their rung."""

    def is_worker(command: list[str]) -> bool:
        if "pipelines.tuning.worker" in command:
            return not (parent := command[-1]).isdigit() or psutil.pid_exists(int(parent))
        ours = "pipelines.cli" in command or any(part.endswith("/tunesmith") for part in command[:2])
        return ours and "worker" in command

    return sum(is_worker(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def used(device: str) -> int:
    """Bytes of memory that this process has now."""
    if device == "cuda":
        import torch

        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def confine(most: int, device: str) -> None:
    """From now on allocations beyond `most` bytes fail in this process, as a MemoryError or torch's RuntimeError, and
    the kernel need not choose whom to kill. Of a processor's memory on Linux only: elsewhere no limit counts private
    memory alone."""
    if device == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, most / _on_gpu()))
        return
    if sys.platform != "linux":
        return
    import resource

    taken = int(psutil.Process().memory_info().data)  # what the limit counts: address space, more than what is used
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = taken + max(0, most - used(device))
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def ran_out(error: Exception) -> bool:
    """Whether an error says that there was no memory left, in Python's words, PyTorch's or the C library's."""
    words = ("out of memory", "not enough memory", "allocate memory", "DefaultCPUAllocator", "bad_alloc")
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


def _on_gpu() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
