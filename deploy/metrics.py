"""What the gateway tells Prometheus about itself; what happened to users is in the request events."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tunesmith_requests",
            "Inference requests by version, slot and status.",
            ["version", "slot", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "tunesmith_request_seconds",
            "Time to the end of an answer.",
            ["version"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "tunesmith_first_token_seconds",
            "Time to the first token of a stream.",
            ["version"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "tunesmith_tokens", "Tokens by version and kind.", ["version", "kind"], registry=self.registry
        )
        self.in_flight = Gauge("tunesmith_requests_in_flight", "Requests being answered.", registry=self.registry)
        self.shadow_dropped = Counter(
            "tunesmith_shadow_dropped", "Copies not sent, since too many were under way.", registry=self.registry
        )
        self.shadow_answers = Counter(
            "tunesmith_shadow_answers",
            "Shadows' answers to copies: the same text as the client had, or another.",
            ["version", "answer"],
            registry=self.registry,
        )
        self.unauthenticated = Counter(
            "tunesmith_unauthenticated", "Requests without a valid key.", registry=self.registry
        )
        self.retries = Gauge(
            "tunesmith_upstream_retries", "Requests that were tried again, or elsewhere.", registry=self.registry
        )
        self.open = Gauge(
            "tunesmith_upstream_open",
            "Whether what kept failing is left alone: 0 no, 0.5 until one request has tried it, 1 yes.",
            ["upstream"],
            registry=self.registry,
        )
        self.events = Gauge(
            "tunesmith_events", "Request events by what became of them.", ["state"], registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
