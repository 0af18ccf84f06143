"""What a collector is to be told, by the environment; apart from monitoring/otlp.py, so that a watcher without a
collector does not pay for OpenTelemetry's libraries."""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)


def wanted() -> frozenset[str]:
    """Of ``traces`` and ``metrics`` those that the environment names an endpoint for; none where it wants a protocol
    that we do not speak."""
    env = os.environ
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return frozenset()
    found = set()
    for signal in ("traces", "metrics"):
        protocol, endpoint = (
            env.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{what}") or env.get(f"OTEL_EXPORTER_OTLP_{what}")
            for what in ("PROTOCOL", "ENDPOINT")
        )
        if endpoint and protocol not in (None, "http/protobuf"):
            log.warning("no %s are told: OTEL_EXPORTER_OTLP_PROTOCOL is %s, give http/protobuf", signal, protocol)
        elif endpoint:
            found.add(signal)
    return frozenset(found)
