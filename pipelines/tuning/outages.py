"""Services that are away for a moment: the search waits for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import Unreachable

log = logging.getLogger(__name__)
T = TypeVar("T")


def passes(error: Exception) -> bool:
    """Whether an error is of a database or MLflow that is away, perhaps for a moment."""
    if isinstance(error, Unreachable):
        return True
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    return isinstance(error, StorageInternalError | DBAPIError)


def patiently(action: Callable[[], T], seconds: float) -> T:
    """The action's result, tried again for so long while a service is away."""
    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Exception as error:
            if not passes(error) or time.monotonic() > end:
                raise
            log.warning("waiting for a service to come back: %s", str(error).splitlines()[0])
        time.sleep(1)
