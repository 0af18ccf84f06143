"""The artifact store's scratch folders: whose they are, and what becomes of them where writing fails."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import storage
from infra.errors import StoreError, StoreFull
from infra.settings import get_settings


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TUNESMITH_ARTIFACTS", str(tmp_path))
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


def test_what_another_machine_is_at_work_on_is_left_to_it_for_a_week(store: Path) -> None:
    """Its lock may not be seen from here: not all shared disks know locks of folders."""
    with storage.scratch("checkpoint") as mine:
        pass
    own, other = (store / "checkpoint" / name for name in (mine.name, ".new-somewhere-else-abc"))
    for folder in (own, other):
        folder.mkdir()
    for hours, left in ((0, {own, other}), (1, {other}), (24 * 8, set())):
        for folder in left | {own, other}:
            if folder.is_dir():
                os.utime(folder, (then := time.time() - 3600 * hours, then))
        storage.sweep()
        assert set((store / "checkpoint").iterdir()) == left


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), StoreError),
        (OSError(errno.EROFS, "Read-only file system"), StoreError),
        (RuntimeError("I/O error: Stale file handle (os error 116)"), StoreError),
        (OSError(errno.ENOSPC, "No space left on device"), StoreFull),
        (RuntimeError("No space left on device (os error 28)"), StoreFull),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_errors_of_the_disk_are_the_stores_own(store: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, storage.scratch("checkpoint"):
        raise error
    assert raised.type is kind
    assert not list((store / "checkpoint").iterdir())
