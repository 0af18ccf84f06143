"""Rows of versions to deploy, for tests that need no model behind them."""

from __future__ import annotations

from psycopg.types.json import Jsonb

from infra.db import Connection, transaction
from registry import versions
from registry.gates import Outcome

DIGEST = "sha256:" + "d" * 64
_BASE = {"id": "b", "revision": "r", "dtype": "float32"} | dict.fromkeys(
    ("digest", "tokenizer_digest", "template_digest"), DIGEST
)
MANIFEST = {
    **{"format": 1, "model": "m", "method": "lora", "base": _BASE, "prompt": {"system": None}, "params": {"r": 8}},
    **{"generation": {}, "dataset": None, "study": None, "trial": None, "code_version": "1", "files": {}},
}


def add_versions(model: str, *decisions: Outcome | None) -> None:
    """Versions 1, 2, ... of a model, with these gate decisions (None: never judged)."""
    with transaction() as conn:
        for number, decision in enumerate(decisions, start=1):
            add_version(conn, model, number, decision)


def add_version(
    conn: Connection,
    model: str,
    number: int,
    decision: Outcome | None = "pass",
    *,
    approvals: int = 0,
    author: str | None = None,
    bundle: str = DIGEST,
    imported_by: str | None = None,
) -> None:
    conn.execute(
        "insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)"
        " values (%(d)s, 'b', 'r', %(d)s, %(d)s, 1, 'float32') on conflict do nothing",
        {"d": DIGEST},
    )
    conn.execute(versions.SQL["ensure_model"], {"model": model})
    gate = None
    if decision is not None:
        body: dict[str, object] = {"decision": decision, "reasons": [f"exact_match: said {decision}"], "gates": []}
        body |= {"approvals": approvals, "author": author} if approvals else {}
        gate = versions.keep_evidence(conn, "gate", body)
    nothing = dict.fromkeys(("dataset_digest", "study", "run_id", "mlflow_run_id", "mlflow_model_id", "evaluation"))
    conn.execute(
        versions.SQL["insert"],
        {
            **nothing,
            "model": model,
            "number": number,
            "bundle_digest": bundle,
            "base_digest": DIGEST,
            "method": "lora",
            "manifest": Jsonb(MANIFEST),
            "metrics": Jsonb({"exact_match": 0.5}),
            "gate": gate,
            "profile": Jsonb({}),
            "imported_by": imported_by,
        },
    )
