"""Logging: plain lines with time and level on standard error, never on standard output."""

from __future__ import annotations

import logging
import sys
import time


class Escaped(logging.Formatter):
    """Lines that stay lines: a message may repeat what a stranger sent, and its control characters are shown as
    escapes. Tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def setup(level: int = logging.INFO) -> None:
    """Send all records of this process to standard error; called once, by a process's entry point."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = Escaped("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "alembic", "urllib3", "aiohttp.access", "psycopg.pool"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
