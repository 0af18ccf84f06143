"""Ports on this machine that nobody listens on."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now, and nobody answers there (macOS lets two bind one port)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not "taken"
        try:
            probe.bind((host, port))
        except OSError:
            return False
    with socket.socket(family) as caller:
        caller.settimeout(1)
        return caller.connect_ex((host, port)) != 0


def free(*, first: int | None = None, host: str = "127.0.0.1", but: Collection[int] = ()) -> int:
    """`first` if it is free, else some free port that is none of `but`.

    Ports come from below the range that the kernel hands to outgoing connections, so that one found free here is
    still free a second later, when the server that it was found for starts to listen.
    """
    if first is not None and first not in but and is_free(first, host):
        return first
    for _ in range(1000):
        port = random.randrange(18_000, 30_000)
        if port not in but and is_free(port, host):
            return port
    raise OSError("no free port between 18000 and 30000")
