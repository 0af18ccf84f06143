"""What was recorded, told to an OpenTelemetry collector over OTLP (http/protobuf): a span a request, and metrics.

Windows mark the batches that are still to be told (``event_batch.to_export``), so nothing of this is on a request's
path, and a collector that is away only has batches wait, for the seven days that their marks are kept. A mark is
cleared when the collector has taken the batch's spans: each span arrives at least once, and where a watcher is killed
in between, once more, with the same trace and span id. Metrics are counted from the watcher's start on, after the
spans were taken: a killed watcher loses what it counted since the last time they were told.

Settings are OpenTelemetry's own variables, of the environment alone. Nothing global is set, so what other libraries in
this process record goes nowhere.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.semconv.attributes.service_attributes import SERVICE_NAME, SERVICE_VERSION
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from infra.db import load_queries, transaction
from infra.errors import Conflict, TunesmithError, Unreachable
from infra.settings import get_settings
from monitoring import batches, genai
from registry import leases

SQL = load_queries(Path(__file__).with_suffix(".sql"))
log = logging.getLogger(__name__)

_ROWS = 2000  # requests that are read together
_SPANS = 1000  # and told together: about half a megabyte
_POLL_SECONDS = 1.0
_MAX_BACK_OFF = 60.0
_END_SECONDS = 3.0


class Exporter:
    """Tells the collector what waits, in a thread of its own: `start` it, `close` it.

    It works while `lease` gives the watcher's lease, so that one watcher tells.
    """

    def __init__(self, lease: Callable[[], leases.Lease | None], wanted: frozenset[str]) -> None:
        self._lease = lease
        self._resource, self._server = _resource(), _server()
        self._scope = InstrumentationScope("tunesmith", self._resource.attributes[SERVICE_VERSION])  # type: ignore[arg-type]
        self._spans = OTLPSpanExporter() if "traces" in wanted else None
        self._meters: MeterProvider | None = None
        if "metrics" in wanted:
            reader = PeriodicExportingMetricReader(OTLPMetricExporter())
            self._meters = MeterProvider([reader], self._resource, shutdown_on_exit=False)
            self._instruments = genai.Instruments(self._meters.get_meter("tunesmith"))
        self._waiting = False  # for a collector that did not take what it was sent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._words = _OncePerReason()

    def start(self) -> None:
        self._words.listen()
        self._thread.start()

    def close(self) -> None:
        """End within some seconds; what the collector has not taken waits for the next start."""
        self._stop.set()
        if self._spans is not None:
            self._spans.shutdown()  # type: ignore[no-untyped-call]  # no next try is waited for
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)
        if self._meters is not None and not self._waiting:
            self._meters.shutdown(timeout_millis=1000 * _END_SECONDS)

    def send(self) -> bool:
        """Tell some of what waits, the oldest first; False when nothing did, or another watcher is at work.

        Raises Unreachable when the collector does not take it, or the database does not answer.
        """
        lease = self._lease()
        if lease is None:
            return False
        with transaction() as conn:
            leases.check(conn, lease)
            waiting = conn.execute(SQL["waiting"], {"rows": _ROWS}).fetchall()
            events = batches.events(conn, SQL["events"], waiting) if waiting else []
        if not waiting:
            return False
        if self._spans is not None:
            for first in range(0, len(events), _SPANS):
                self._tell(self._spans, events[first : first + _SPANS])
        with transaction() as conn:
            leases.check(conn, lease)
            conn.execute(SQL["taken"], {"batches": [batch["id"] for batch in waiting]})
        if self._meters is not None:
            for event in events:
                self._instruments.record(event)
        return True

    def _tell(self, spans: OTLPSpanExporter, events: Sequence[Mapping[str, Any]]) -> None:
        made = [_span(event, self._resource, self._scope, self._server) for event in events]
        if spans.export(made) is not SpanExportResult.SUCCESS:
            raise Unreachable("The collector of OTEL_EXPORTER_OTLP_ENDPOINT did not take what it was sent.")

    def _run(self) -> None:
        wait, failures = _POLL_SECONDS, 0
        while not self._stop.wait(wait):
            try:
                wait = 0.0 if self.send() else _POLL_SECONDS
            except Conflict:  # the watcher will see it too
                wait = _POLL_SECONDS
            except Exception as error:
                failures += 1
                wait = min(_MAX_BACK_OFF, 2.0**failures)
                if not self._waiting and not self._stop.is_set():
                    log.warning("spans wait: %s", error, exc_info=not isinstance(error, TunesmithError))
                self._waiting = True
                continue
            if self._waiting:
                log.info("spans are taken again")
                self._words.forget()
            failures, self._waiting = 0, False


class _OncePerReason(logging.Handler):
    """OpenTelemetry's exporters say at each try why it failed, and say it nowhere else: told once, until it is over."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: set[str] = set()

    def listen(self) -> None:
        theirs = logging.getLogger("opentelemetry.exporter")
        theirs.handlers, theirs.propagate = [self], False

    def forget(self) -> None:
        self._told.clear()

    def emit(self, record: logging.LogRecord) -> None:
        reason = f"{record.name} {record.msg}"  # without its arguments, which hold the next wait
        if reason not in self._told:
            self._told.add(reason)
            log.warning("%s", record.getMessage())


def _resource() -> Resource:
    """Who tells: ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``, by default the service ``tunesmith``."""
    given = OTELResourceDetector().detect().attributes
    own = {SERVICE_NAME: "tunesmith", SERVICE_VERSION: importlib.metadata.version("tunesmith")}
    return Resource.create({name: given.get(name, value) for name, value in own.items()})


def _server() -> tuple[str, int] | None:
    """Where the gateway answers, as far as this process knows."""
    parts = urlsplit(get_settings().gateway_url or "")
    if not parts.hostname:
        return None
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _span(
    event: Mapping[str, Any], resource: Resource, scope: InstrumentationScope, server: tuple[str, int] | None
) -> ReadableSpan:
    """A request as it was seen by who answered it, so of kind SERVER; the conventions' own spans are those of who asks.

    The trace's id is the request's. Errors are what windows count as such, from 500 on.
    """
    identifier: uuid.UUID = event["id"]
    start = (identifier.int >> 80) * 1_000_000  # the milliseconds of a UUIDv7
    return ReadableSpan(
        name=genai.span_name(event),
        context=SpanContext(
            trace_id=identifier.int,
            span_id=identifier.int & (2**64 - 1),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        ),
        resource=resource,
        attributes=genai.attributes(event, server),
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR if event["status"] >= 500 else StatusCode.UNSET),
        start_time=start,
        end_time=start + round(event["latency_ms"] * 1_000_000),
        instrumentation_scope=scope,
    )
