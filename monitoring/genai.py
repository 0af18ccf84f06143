"""Request events in the words of OpenTelemetry's GenAI semantic conventions; no other module knows these words.

The conventions are in development and their names still move, lately out of the package
opentelemetry-semantic-conventions (0.66b2 has them as deprecated) into a repository of their own. So they are written
out here, and a test holds them to that package for as long as it has them. Names that are stable come from it.

What was asked and answered is opt-in by the conventions (``gen_ai.input.messages``, ``gen_ai.output.messages``,
``gen_ai.system_instructions``), and is never told; nor is an error's sentence, which may quote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.metrics import Meter
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import HTTP_RESPONSE_STATUS_CODE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT

OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"  # seconds
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - a name
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"

CLIENT_TOKEN_USAGE: Final = "gen_ai.client.token.usage"  # noqa: S105
SERVER_REQUEST_DURATION: Final = "gen_ai.server.request.duration"
SERVER_TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"  # noqa: S105

# Values of theirs. An event does not say which of the two addresses was asked, so completions are chats too.
CHAT: Final = "chat"
INPUT: Final = "input"
OUTPUT: Final = "output"

# Ours, for what they have no name for
PROVIDER: Final = "tunesmith"
SLOT: Final = "tunesmith.slot"
KEY_ID: Final = "tunesmith.key.id"
COST_USD: Final = "tunesmith.cost_usd"

# The buckets that the conventions advise (docs/gen-ai/gen-ai-metrics.md)
_TOKENS = [4**power for power in range(14)]
_SECONDS = [0.01 * 2**power for power in range(14)]
_SECONDS_TO_FIRST = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]

Attributes = dict[str, str | int | float | bool | list[str]]


def span_name(event: Mapping[str, Any]) -> str:
    """``{gen_ai.operation.name} {gen_ai.request.model}``."""
    return f"{CHAT} {event['model']}".strip()


def attributes(event: Mapping[str, Any], server: tuple[str, int] | None) -> Attributes:
    """What a span says of a request, an event by otlp.sql; `server` is where our gateway answers."""
    found: Attributes = {
        OPERATION_NAME: CHAT,
        PROVIDER_NAME: PROVIDER,
        RESPONSE_ID: str(event["id"]),
        REQUEST_STREAM: event["stream"],
        HTTP_RESPONSE_STATUS_CODE: event["status"],
        SLOT: event["slot"],
        COST_USD: event["cost_usd"],
    }
    if event["model"]:
        found[REQUEST_MODEL] = event["model"]
    if event["version"] is not None:
        found[RESPONSE_MODEL] = f"{event['model']}:{event['version']}"
        found[USAGE_INPUT_TOKENS] = event["prompt_tokens"]
        found[USAGE_OUTPUT_TOKENS] = event["completion_tokens"]
    if event["finish_reason"]:
        found[RESPONSE_FINISH_REASONS] = [event["finish_reason"]]
    if event["stream"] and event["ttft_ms"] is not None:
        found[RESPONSE_TIME_TO_FIRST_CHUNK] = event["ttft_ms"] / 1000
    if event["status"] != 200:
        found[ERROR_TYPE] = error_type(event)
    if event["key_id"] is not None:  # else it is an event of another gateway
        found[KEY_ID] = event["key_id"]
        if server is not None:
            found[SERVER_ADDRESS], found[SERVER_PORT] = server
    return found


def error_type(event: Mapping[str, Any]) -> str:
    """The code that our answer gave, such as ``rate_limit_exceeded``; else the status."""
    return str(event["error_code"] or event["status"])


class Instruments:
    """The conventions' metrics that events can tell."""

    def __init__(self, meter: Meter) -> None:
        self._duration = meter.create_histogram(
            SERVER_REQUEST_DURATION,
            unit="s",
            description="Generative AI server request duration such as time-to-last byte or last output token.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._first = meter.create_histogram(
            SERVER_TIME_TO_FIRST_TOKEN,
            unit="s",
            description="Time to generate first token for successful responses.",
            explicit_bucket_boundaries_advisory=_SECONDS_TO_FIRST,
        )
        self._tokens = meter.create_histogram(
            CLIENT_TOKEN_USAGE,
            unit="{token}",
            description="Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def record(self, event: Mapping[str, Any]) -> None:
        """One request. Names of models that were asked for and are none are no attributes: there are endlessly many."""
        common: dict[str, str] = {OPERATION_NAME: CHAT, PROVIDER_NAME: PROVIDER, SLOT: event["slot"]}
        if event["version"] is not None:
            common |= {REQUEST_MODEL: event["model"], RESPONSE_MODEL: f"{event['model']}:{event['version']}"}
            self._tokens.record(event["prompt_tokens"], common | {TOKEN_TYPE: INPUT})
            self._tokens.record(event["completion_tokens"], common | {TOKEN_TYPE: OUTPUT})
        answered = event["status"] == 200
        self._duration.record(
            event["latency_ms"] / 1000, common if answered else common | {ERROR_TYPE: error_type(event)}
        )
        if answered and event["ttft_ms"] is not None:
            self._first.record(event["ttft_ms"] / 1000, common)
