"""What decisions rest on: JSON under its own digest, kept for ever; and what of an evaluation is relied on when it is
read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from psycopg.types.json import Jsonb
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from infra import storage
from infra.db import Connection, load_queries
from infra.errors import NotFound
from registry.bundle import Digest, canonical_json
from registry.gates import Must, Outcome
from registry.statistics import Estimate

SQL = load_queries(Path(__file__).with_suffix(".sql"))


def evidence(conn: Connection, digest: str | None) -> dict[str, Any] | None:
    """The kept evaluation, gate decision or promotion of a digest; None for None. Raises NotFound."""
    if digest is None:
        return None
    row = conn.execute(SQL["read"], {"digest": digest}).fetchone()
    if row is None:
        raise NotFound(f"There is no evidence {digest}.")
    return dict(row["body"])


def keep_evidence(conn: Connection, kind: str, body: Mapping[str, Any]) -> str:
    """Keep evidence for ever and return its digest, which is that of its canonical JSON."""
    import orjson

    text = canonical_json(dict(body))
    digest = storage.text_digest(text)
    conn.execute(SQL["keep"], {"digest": digest, "kind": kind, "body": Jsonb(orjson.loads(text))})
    return digest


def check_evaluation(value: Any) -> None:
    """Raises ValueError for an evaluation.json that commands and pages could not show. It may hold more than is looked
    at here."""
    _EVALUATION.validate_python(value)


def _is_estimate(value: dict[str, Any]) -> dict[str, Any]:
    try:
        Estimate.from_json(value)
    except (LookupError, TypeError) as error:
        raise ValueError(f"no estimate: {type(error).__name__} {error}") from error
    return value


_Estimate = Annotated[dict[str, Any], AfterValidator(_is_estimate)]
_Metrics = dict[str, dict[str, _Estimate | None]]
_Sentences = dict[str, str]


class _Gate(BaseModel):
    metric: str
    must: Must
    against: str | None = None
    slice: str | None = None
    margin: float = 0.0
    value: float | None = None
    min_rows: int = 0
    decision: Outcome
    reason: str
    estimate: _Estimate | None = None


class _Decision(BaseModel):
    decision: Outcome
    reasons: list[str]
    gates: list[_Gate] = []
    approvals: int = Field(default=0, ge=0)
    author: str | None = None
    evaluation: Digest | None = None
    champion: int | None = None
    champion_bundle: Digest | None = None


class _Scorer(BaseModel):
    kappa: float
    agreement: float
    n: int
    set: str
    kappa_low: float = 0.0
    kappa_high: float = 0.0


class _About(BaseModel):
    notes: list[str] = []
    scorers: dict[str, _Scorer] = {}


class _Example(BaseModel):
    messages: list[dict[str, Any]]
    expected: str
    candidate: str | None = None


class _Evaluation(BaseModel):
    metrics: _Metrics
    slices: dict[str, _Metrics] = {}
    rows: int
    suites: list[str] = []
    not_applicable: _Sentences = {}
    unavailable: _Sentences = {}
    doubted: _Sentences = {}
    about: dict[str, _About] = {}
    examples: list[_Example] = []
    answers: dict[str, str] = {}
    gate: _Decision | None = None


_EVALUATION = TypeAdapter(_Evaluation)
