"""Bundles, bases, data sets and checkpoints, kept by digest in folders under ``<home>/artifacts``, or the
folder that ``TUNESMITH_ARTIFACTS`` names: several machines may share it, wherever each has it mounted.

A kept folder never changes: the digest is its name, and writing it again is a no-op. A folder becomes visible
by one rename, so a crash or a full disk leaves nothing half-made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from infra.errors import NotFound, StoreError, StoreFull
from infra.settings import get_settings

Kind = Literal["bundle", "base", "dataset", "checkpoint", "tokens"]
_NEW, _OLD = ".new-", ".old-"  # what scratch folders' names begin with, and those of what is being removed
_LONGEST = 7 * 86_400.0  # seconds that another machine may be at work on a scratch folder
# safetensors writes in Rust, and raises an error of its own with the number in its words
_NUMBER = re.compile(r"\(os error (\d+)\)")


def file_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """``sha256:<hex>`` of a text in UTF-8."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """``sha256:<hex>`` over the sorted relative names and digests of all files below `folder`."""
    lines = [f"{p.relative_to(folder).as_posix()} {file_digest(p)}" for p in sorted(folder.rglob("*")) if p.is_file()]
    return text_digest("\n".join(lines))


def root() -> Path:
    """The folder that holds all kinds."""
    settings = get_settings()
    return (settings.artifacts or settings.home / "artifacts").expanduser().absolute()


def used() -> dict[str, int]:
    """The bytes that each kind holds; what comes and goes meanwhile counts or not."""
    found: dict[str, int] = {}
    for kind in get_args(Kind):
        found[kind] = 0
        for folder, _, names in os.walk(root() / kind):
            for name in names:
                with contextlib.suppress(OSError):
                    found[kind] += Path(folder, name).lstat().st_size
    return found


def where(kind: Kind, digest: str) -> Path:
    """Where a digest's folder is, or would be. Raises ValueError for what is not a digest."""
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"not a digest: {digest!r}")
    return root() / kind / value


def has(kind: Kind, digest: str) -> bool:
    return where(kind, digest).is_dir()


def get(kind: Kind, digest: str) -> Path:
    """The folder of a digest, to be read only. Raises NotFound."""
    folder = where(kind, digest)
    if not folder.is_dir():
        raise NotFound(f"The {kind} {digest} is not in the artifact store {folder.parent}.")
    return folder


def sound(kind: Kind, digest: str) -> bool:
    """Whether the folder of a digest is there, and what is in it is what the digest was taken of."""
    folder = where(kind, digest)
    return folder.is_dir() and folder_digest(folder) == digest


@contextmanager
def scratch(kind: Kind) -> Iterator[Path]:
    """An empty folder on the store's own disk, to be filled and then given to `keep`; removed at the end."""
    parent = root() / kind
    parent.mkdir(parents=True, exist_ok=True)
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_mine(), dir=parent))
    folder.chmod(0o755)
    in_use = os.open(folder, os.O_RDONLY)
    fcntl.flock(in_use, fcntl.LOCK_EX)
    try:
        yield folder
    except Exception as error:
        if (code := _number(error)) is None:
            raise
        words = f"Writing a {kind} to {parent} failed: {getattr(error, 'strerror', None) or error}."
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull(words, hint="Free some disk and try again.") from error
        raise StoreError(words, hint="See whether the artifacts' disk is there and can be written.") from error
    finally:
        os.close(in_use)
        shutil.rmtree(folder, ignore_errors=True)


def _mine() -> str:
    """What the names of this machine's scratch folders begin with."""
    return f"{_NEW}{socket.gethostname()}-"


def _number(error: Exception) -> int | None:
    """The system's number of an error of input and output, 0 where it has none; None of other errors."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None


def sweep() -> None:
    """Remove the scratch folders, of all kinds, of processes that died: a living one holds a lock on its own. Other
    machines cannot see that lock on every kind of shared disk, so theirs are removed when they are very old."""
    found = [*root().glob(f"*/{_NEW}*"), *root().glob(f"*/{_OLD}*")]
    if not found:
        return
    # By the clock of the store, which other machines may share and this one's may differ from
    with tempfile.NamedTemporaryFile(dir=root(), prefix=".clock-") as clock:
        now = Path(clock.name).stat().st_mtime
    for folder in found:
        try:
            ours = folder.name.startswith((_mine(), _OLD))
            if now - folder.stat().st_mtime < (60 if ours else _LONGEST):  # perhaps made, but not locked yet
                continue
            held = os.open(folder, os.O_RDONLY)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(held)


def keep(kind: Kind, digest: str, folder: Path) -> Path:
    """Move a `scratch` folder to its digest's place and return that; keeps what is there when it is there."""
    target = where(kind, digest)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def remove(kind: Kind, digest: str) -> None:
    """Give up a folder that nobody needs any more; no-op when it is not there."""
    folder = where(kind, digest)
    going = folder.with_name(f"{_OLD}{folder.name}")  # what a crash leaves of it is swept as a scratch folder is
    with contextlib.suppress(FileNotFoundError):
        folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)
