"""Real text and a registered version, for tests of monitoring: the interpreter's own signatures and docstrings."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from psycopg.types.json import Jsonb

from infra.db import Connection
from registry.profile import FEATURES, Answer, Extractor, Profile, build

Pair = tuple[str, str]
SYSTEM = {"role": "system", "content": "Write the one-line docstring of this Python function."}


@lru_cache(maxsize=1)
def worlds() -> tuple[list[Pair], list[Pair]]:
    """(signature, docstring) pairs of the standard library, and of numpy and torch; read in a process of its own,
    since reading them imports all of it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _READ], capture_output=True, check=True, text=True, timeout=300
    )
    old, new = json.loads(done.stdout)
    return [(a, b) for a, b in old], [(a, b) for a, b in new]


_READ = """
import json
from pipelines.docstrings import packages, standard_library
new = packages("numpy", "numpy.linalg", "numpy.fft", "numpy.ma", "torch", "torch.nn.functional")
print(json.dumps([[(p.signature, p.summary) for p in world] for world in (standard_library(), new)]))
"""


def shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    return random.Random(seed).sample(pairs, len(pairs))


def messages(pair: Pair) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": pair[0]}]


def tokens(text: str) -> int:
    return max(1, len(text) // 3)


def answer(pair: Pair) -> Answer:
    return Answer(text=pair[1], completion_tokens=tokens(pair[1]), finish_reason="stop")


def profile(train: Iterable[Pair], judged: Iterable[Pair], similarities: Iterable[float] = ()) -> Profile:
    return build(
        ((messages(p), 20 + tokens(p[0])) for p in train),
        ((messages(p), answer(p), 20 + tokens(p[0])) for p in judged),
        similarities,
    )


def histograms(reference: Profile, pairs: Iterable[Pair]) -> dict[str, list[int]]:
    """What windows would hold of these requests."""
    extractor = Extractor(reference)
    counts = {f.name: [0] * f.bins for f in FEATURES}
    for pair in pairs:
        values = extractor.features(messages(pair), answer(pair), 20 + tokens(pair[0]))
        for feature, value in zip(FEATURES, values, strict=True):
            if value == value:
                counts[feature.name][feature.bin(value)] += 1
    return counts


def register(
    conn: Connection, model: str, number: int, reference: Profile, *, settings: dict[str, Any], champion: bool = True
) -> None:
    """A version as the registry writes it, as far as monitoring reads it."""
    conn.execute("insert into model (name, settings) values (%s, %s) on conflict do nothing", (model, Jsonb(settings)))
    conn.execute(
        "insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)"
        " values ('sha256:b', 'b', 'r', 't', 'c', 1, 'float32') on conflict do nothing"
    )
    conn.execute(
        "insert into version (model, number, bundle_digest, base_digest, method, manifest, profile)"
        " values (%s, %s, 'sha256:v', 'sha256:b', 'lora', '{}', %s)",
        (model, number, Jsonb(reference.to_json())),
    )
    if champion:
        serve(conn, model, number)


def serve(conn: Connection, model: str, number: int) -> None:
    conn.execute(
        "insert into deployment (model, generation, champion) values (%s, 1, %s)"
        " on conflict (model) do update set champion = excluded.champion, generation = deployment.generation + 1",
        (model, number),
    )


def event(
    model: str,
    version: int,
    reference: Profile,
    pair: Pair,
    *,
    at: datetime | None = None,
    keep_text: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A request event as the gateway's recorder sends it."""
    at = at or datetime.now(UTC)
    identifier = uuid7(at)
    values = Extractor(reference).features(messages(pair), answer(pair), 20 + tokens(pair[0]))
    return {
        "id": str(identifier),
        "model": model,
        "version": version,
        "slot": "champion",
        "key_id": "k",
        "client_request_id": None,
        "status": 200,
        "error": None,
        "stream": False,
        "prompt_tokens": 20 + tokens(pair[0]),
        "completion_tokens": tokens(pair[1]),
        "ttft_ms": 40.0,
        "latency_ms": 120.0,
        "engine_seconds": 0.05,
        "cost_usd": 0.0001,
        "finish_reason": "stop",
        "features": values,
        "subject": None,
        "messages": messages(pair) if keep_text else None,
        "answer": pair[1] if keep_text else None,
        **changes,
    }


def uuid7(at: datetime) -> uuid.UUID:
    """RFC 9562, section 5.7: 48 bits of milliseconds, the version, the variant, the rest at random."""
    milliseconds = int(at.timestamp() * 1000)
    low = (0b10 << 62) | random.getrandbits(62)
    return uuid.UUID(int=(milliseconds << 80) | (0x7 << 76) | (random.getrandbits(12) << 64) | low)


def minutes_ago(minutes: float) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=minutes)
