"""The names of OpenTelemetry's conventions, held to the package that has them."""

from __future__ import annotations

import logging

import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

from monitoring import genai, signals


def test_names_are_those_of_the_conventions() -> None:
    theirs = {
        value
        for module in (gen_ai_attributes, gen_ai_metrics)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    ours = {value for name, value in vars(genai).items() if name.isupper() and str(value).startswith("gen_ai.")}
    assert len(ours) == 14
    assert ours <= theirs, ours - theirs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, set()),
        ({"ENDPOINT": "http://c:4318"}, {"traces", "metrics"}),
        ({"TRACES_ENDPOINT": "http://c:4318/v1/traces"}, {"traces"}),
        ({"METRICS_ENDPOINT": "http://c:4318/v1/metrics"}, {"metrics"}),
        ({"ENDPOINT": "http://c:4318", "PROTOCOL": "http/protobuf"}, {"traces", "metrics"}),
        ({"ENDPOINT": "http://c:4318", "PROTOCOL": "grpc", "TRACES_PROTOCOL": "http/protobuf"}, {"traces"}),
    ],
)
def test_nothing_is_told_where_no_endpoint_is_named(
    given: dict[str, str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    assert signals.wanted() == expected
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert signals.wanted() == set()


def test_another_protocol_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with caplog.at_level(logging.WARNING):
        assert signals.wanted() == set()
    assert "no traces are told: OTEL_EXPORTER_OTLP_PROTOCOL is grpc, give http/protobuf" in caplog.messages
