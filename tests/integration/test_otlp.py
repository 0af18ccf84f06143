"""What a collector is told: a real OTLP/HTTP receiver, real events in the database."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import traffic
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from deploy import recorder
from infra import settings as infra_settings
from infra.db import one, transaction
from infra.errors import Conflict, Unreachable
from infra.settings import Settings
from monitoring import otlp, watch

AT = (datetime.now(UTC) - timedelta(hours=1)).replace(microsecond=250_000)
AT_NS = (AT - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1) * 1_000_000
SECRET = "Wie heisst mein Kind, Xaveria?"


class Collector:
    """A receiver of OTLP over HTTP, as a collector has it. `status` is what it answers, `hook` runs before."""

    def __init__(self) -> None:
        self.status, self.hook = 200, lambda: None
        self.bodies: list[bytes] = []
        self.heads: list[dict[str, str]] = []
        self.spans: queue.Queue[tuple[dict[str, Any], ProtoSpan]] = queue.Queue()
        self.metrics: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.hook()
                if collector.status == 200:
                    collector.bodies.append(body)
                    collector.heads.append({name.lower(): value for name, value in self.headers.items()})
                    collector.take(self.path, body)
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.metrics += [metric for scope in resource.scope_metrics for metric in scope.metrics]
            return
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put((plain(resource.resource.attributes), span))

    def all(self) -> list[ProtoSpan]:
        """The spans that came so far."""
        return [self.spans.get_nowait()[1] for _ in range(self.spans.qsize())]

    def next(self, count: int) -> list[ProtoSpan]:
        """As many spans, waited for."""
        return [self.spans.get(timeout=60)[1] for _ in range(count)]


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as Python has them."""

    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        found = getattr(any_value, kind)
        return [value(each) for each in found.values] if kind == "array_value" else found

    return {attribute.key: value(attribute.value) for attribute in attributes}


@pytest.fixture
def collector(database: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    receiver = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("TUNESMITH_GATEWAY_URL", "http://models.example:8099")
    infra_settings.get_settings.cache_clear()
    yield receiver
    while BEGUN:  # their threads would go on, and try again what no collector takes
        BEGUN.pop().close()
    receiver.server.shutdown()
    receiver.server.server_close()


PROFILE = traffic.profile([], [])
BEGUN: list[otlp.Exporter] = []


def happened(*changes: dict[str, Any]) -> list[uuid.UUID]:
    """Requests, recorded; their ids."""
    made = [traffic.event("m", 3, PROFILE, (SECRET, SECRET), keep_text=True) | change for change in changes]
    with transaction() as conn:
        recorder.store(conn, uuid.uuid4(), made)
    return [uuid.UUID(event["id"]) for event in made]


def watching() -> tuple[watch.Watcher, otlp.Exporter]:
    watcher = watch.Watcher("test")
    watcher.turn()
    BEGUN.append(otlp.Exporter(lambda: watcher.lease, watcher.exports))
    return watcher, BEGUN[-1]


def ids(spans: list[ProtoSpan]) -> list[uuid.UUID]:
    return [uuid.UUID(bytes=span.trace_id) for span in spans]


def waiting() -> int:
    with transaction() as conn:
        return int(one(conn, "select count(*) as n from event_batch where to_export")["n"])


def test_each_request_is_a_span_and_nothing_of_its_text_is_told(collector: Collector) -> None:
    def at(seconds: int) -> dict[str, Any]:
        return {"id": str(traffic.uuid7(AT + timedelta(seconds=seconds)))}

    answered, refused, failed, foreign = happened(
        at(0) | {"stream": True, "slot": "challenger", "finish_reason": "length", "subject": "sha256:xaveria"},
        at(1)
        | {"version": None, "slot": "none", "status": 429, "error": f"rate_limit_exceeded: {SECRET}"}
        | {"prompt_tokens": 0, "completion_tokens": 0, "ttft_ms": None, "finish_reason": None},
        at(2) | {"status": 500, "error": f"ValueError: {SECRET}", "finish_reason": None, "client_request_id": SECRET},
        at(3) | {"status": 503, "error": f"xaveria: {SECRET}", "key_id": None, "finish_reason": None},
    )
    _, exporter = watching()
    assert exporter.send()
    assert not exporter.send(), "all was told"

    resource, _ = collector.spans.queue[0]
    assert resource["service.name"] == "tunesmith"
    assert {head["authorization"] for head in collector.heads} == {"Bearer abc"}
    assert {head["content-type"] for head in collector.heads} == {"application/x-protobuf"}
    found = {uuid.UUID(bytes=span.trace_id): span for span in collector.all()}
    assert set(found) == {answered, refused, failed, foreign}

    span = found[answered]
    assert (span.name, span.kind) == ("chat m", ProtoSpan.SPAN_KIND_SERVER)
    assert span.span_id == answered.bytes[8:]
    assert span.parent_span_id == b""
    assert span.start_time_unix_nano == AT_NS
    assert span.end_time_unix_nano == AT_NS + 120_000_000
    assert span.status.code == Status.STATUS_CODE_UNSET
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tunesmith",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": False,
        "tunesmith.key.id": "k",
        "tunesmith.cost_usd": 0.0001,
        "server.address": "models.example",
        "server.port": 8099,
    }
    of_version = {
        "gen_ai.response.model": "m:3",
        "gen_ai.usage.input_tokens": 20 + traffic.tokens(SECRET),
        "gen_ai.usage.output_tokens": traffic.tokens(SECRET),
        "tunesmith.slot": "champion",
    }
    first = plain(span.attributes)
    assert first.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(0.04)
    assert first == common | of_version | {
        "gen_ai.response.id": str(answered),
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["length"],
        "http.response.status_code": 200,
        "tunesmith.slot": "challenger",
    }
    span = found[refused]
    assert span.start_time_unix_nano == AT_NS + 1_000_000_000
    assert span.status.code == Status.STATUS_CODE_UNSET, "a refusal is not our error"
    assert plain(span.attributes) == common | {
        "gen_ai.response.id": str(refused),
        "http.response.status_code": 429,
        "error.type": "rate_limit_exceeded",
        "tunesmith.slot": "none",
    }
    span = found[failed]
    assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "")
    assert plain(span.attributes) == common | of_version | {
        "gen_ai.response.id": str(failed),
        "http.response.status_code": 500,
        "error.type": "500",
    }
    others = plain(found[foreign].attributes)
    assert others["error.type"] == "503", "words of another gateway are anybody's"
    assert not {"server.address", "tunesmith.key.id"} & set(others)
    for body in collector.bodies:
        assert b"Xaveria" not in body
        assert b"xaveria" not in body


def test_a_service_has_the_name_that_the_environment_gives(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "support-models")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging,service.name=not-this")
    happened({})
    _, exporter = watching()
    assert exporter.send()
    resource, _ = collector.spans.get_nowait()
    assert resource["service.name"] == "support-models"
    assert resource["deployment.environment.name"] == "staging"


def test_what_a_collector_did_not_take_waits_for_it(collector: Collector) -> None:
    expected = happened({}, {})
    _, exporter = watching()
    collector.status = 503
    with pytest.raises(Unreachable, match="did not take"):
        exporter.send()
    assert waiting() == 1
    collector.server.shutdown()  # and then it is gone altogether
    collector.server.server_close()
    with pytest.raises(Unreachable, match="did not take"):
        exporter.send()
    assert waiting() == 1
    assert collector.all() == []

    with pytest.MonkeyPatch.context() as patch:
        later = Collector()
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", later.url)
        _, exporter = _again(watching)
        assert exporter.send()
        assert sorted(ids(later.all())) == sorted(expected)
        assert waiting() == 0
        later.server.shutdown()
        later.server.server_close()


def _again(begin: Callable[[], tuple[watch.Watcher, otlp.Exporter]]) -> tuple[watch.Watcher, otlp.Exporter]:
    """A watcher's next start, when the last one has ended."""
    with transaction() as conn:
        conn.execute("update lease set expires_at = now()")
    return begin()


def test_a_collector_that_hangs_holds_up_no_watcher(collector: Collector) -> None:
    open_again, asked = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        open_again.wait()

    collector.hook = hang
    expected = happened({})
    watcher, exporter = watching()
    exporter.start()
    try:
        assert asked.wait(60)
        for _ in range(5):  # would never come back if it waited for the collector
            expected += happened({})
            watcher.turn()
        with transaction() as conn:
            assert one(conn, "select sum(requests) as n from traffic_window where grain = 'minute'")["n"] == 6
        open_again.set()
        arrived: set[uuid.UUID] = set()
        while not arrived >= set(expected):
            arrived |= set(ids(collector.next(1)))
    finally:
        open_again.set()
        exporter.close()


def test_a_restart_goes_on_where_the_last_watcher_ended(collector: Collector) -> None:
    first = happened({}, {})
    watcher, exporter = watching()
    assert exporter.send()
    assert sorted(ids(collector.all())) == sorted(first)
    second = happened({})
    watcher.turn()
    _, exporter = _again(watching)
    third = happened({}, {}, {})
    assert exporter.send()
    assert ids(collector.all()) == second, "and the third is in no window yet"
    _, exporter = _again(watching)
    assert exporter.send()
    assert sorted(ids(collector.all())) == sorted(third)
    assert not exporter.send()


def test_who_lost_the_lease_while_telling_has_it_told_again_as_the_same_span(collector: Collector) -> None:
    def other_watcher() -> None:
        with transaction() as conn:
            conn.execute("update lease set token = token + 1")

    [expected] = happened({})
    watcher, exporter = watching()
    collector.hook = other_watcher
    with pytest.raises(Conflict):
        exporter.send()
    collector.hook = lambda: None
    _, exporter = _again(watching)
    assert exporter.send()
    once, twice = collector.all()
    assert uuid.UUID(bytes=once.trace_id) == expected
    assert once == twice

    watcher, exporter = watching()
    assert watcher.lease is None
    assert not exporter.send(), "who stands by tells nothing"


def test_what_happened_before_a_collector_was_named_is_not_told(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened({})
    with monkeypatch.context() as patch:
        patch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
        watch.Watcher("test").turn()
    assert waiting() == 0
    expected = happened({})
    _, exporter = _again(watching)
    assert exporter.send()
    assert ids(collector.all()) == expected


def test_the_watcher_tells_spans_and_metrics(collector: Collector) -> None:
    stop = threading.Event()
    watcher = threading.Thread(target=watch.run, args=(stop,))
    watcher.start()
    try:
        happened(
            {"latency_ms": 30.0, "ttft_ms": 3.0},
            {"latency_ms": 500.0, "ttft_ms": 200.0, "prompt_tokens": 900},
            {"latency_ms": 5.0, "status": 502, "error": "upstream: no"},
            {"model": f"{uuid.uuid4()}", "version": None, "slot": "none", "status": 404, "error": "not_found: no"},
        )
        collector.next(4)
    finally:
        stop.set()
        watcher.join()
    found = {metric.name: metric for metric in collector.metrics}
    assert {name: metric.unit for name, metric in found.items()} == {
        "gen_ai.server.request.duration": "s",
        "gen_ai.server.time_to_first_token": "s",
        "gen_ai.client.token.usage": "{token}",
    }
    common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "tunesmith"}
    served = common | {"gen_ai.request.model": "m", "gen_ai.response.model": "m:3", "tunesmith.slot": "champion"}

    def points(name: str) -> dict[frozenset[tuple[str, str]], Any]:
        return {frozenset(plain(p.attributes).items()): p for p in found[name].histogram.data_points}

    durations = points("gen_ai.server.request.duration")
    assert set(durations) == {
        frozenset(served.items()),
        frozenset((served | {"error.type": "upstream"}).items()),
        frozenset((common | {"tunesmith.slot": "none", "error.type": "not_found"}).items()),
    }
    answered = durations[frozenset(served.items())]
    assert (answered.count, answered.sum) == (2, pytest.approx(0.53))
    assert list(answered.explicit_bounds) == [
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    ]  # fmt: skip
    assert [i for i, n in enumerate(answered.bucket_counts) if n] == [2, 6]
    [first] = points("gen_ai.server.time_to_first_token").values()
    assert (first.count, first.sum) == (2, pytest.approx(0.203))
    assert list(first.explicit_bounds)[:3] == [0.001, 0.005, 0.01]
    tokens = points("gen_ai.client.token.usage")
    asked = tokens[frozenset((served | {"gen_ai.token.type": "input"}).items())]
    assert (asked.count, asked.sum) == (3, 900 + 2 * (20 + traffic.tokens(SECRET)))
    assert list(asked.explicit_bounds)[-1] == 67_108_864
    said = tokens[frozenset((served | {"gen_ai.token.type": "output"}).items())]
    assert said.sum == 3 * traffic.tokens(SECRET)
