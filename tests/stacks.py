"""A stack as a person has it, for acceptance tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


def new_folder() -> Path:
    """A temporary folder that others may pass through."""
    # Not pytest's tmp_path: as root PostgreSQL runs as another user, to whom pytest's folders are closed.
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-"))
    folder.chmod(0o755)
    return folder


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack that runs, as a person has it: a home, a key, addresses, and the command line."""

    home: Path
    key: str
    gateway_url: str
    mlflow_url: str
    prefect_url: str

    def tunesmith(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command on this home, as a process of its own."""
        return tunesmith(self.home, *arguments, timeout=timeout)


def tunesmith(home: Path, *arguments: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `tunesmith` as a process of its own on a home; `env` is added to the environment."""
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        env=os.environ | {"TUNESMITH_HOME": str(home)} | env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
