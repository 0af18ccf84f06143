"""A believable month in the life of three models, written as rows: for the console's tests, and to look at its pages.

Two versions of a docstring writer: the first drifts when numpy's signatures come, the second, made from corrections,
takes over, is rolled back and comes again. One model has a version that nothing serves yet, one has nothing.
"""

from __future__ import annotations

import inspect
import json
import random
import shlex
import statistics as stdlib_statistics
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from psycopg.types.json import Jsonb

from infra.db import Connection
from monitoring import drift, feedback, golden, windows
from registry import deployments, versions
from registry.deployments import FIRST_HASH, Entry
from registry.profile import Answer, Extractor, Profile, build

MODEL = "docstring-writer"
HOSTILE = "<script>alert('x')</script> '; drop table model; -- \x1b[31m"
_BASE = "sha256:" + "b" * 64
_DATA = ("sha256:" + "1d" * 32, "sha256:" + "2d" * 32)
_MINUTE = timedelta(minutes=1)
_REPLICA = uuid.uuid4()


def uuid7(at: datetime, random_source: random.Random) -> uuid.UUID:
    """A UUIDv7 of a given millisecond."""
    value = int(at.timestamp() * 1000) << 80 | 0x7 << 76 | random_source.getrandbits(12) << 64
    return uuid.UUID(int=value | 0b10 << 62 | random_source.getrandbits(62))


def known_world() -> list[tuple[str, str]]:
    """(signature, first line of the docstring) of some of the standard library."""
    return list(_pairs(json, shlex, stdlib_statistics, inspect, random, uuid))


def new_world() -> list[tuple[str, str]]:
    """The same of numpy."""
    return list(_pairs(np, np.linalg, np.random))


def _pairs(*modules: Any) -> Iterator[tuple[str, str]]:
    for module in modules:
        for name in sorted(n for n in dir(module) if not n.startswith("_")):
            thing = getattr(module, name)
            line = (inspect.getdoc(thing) or "").strip().splitlines()
            try:
                signature = str(inspect.signature(thing))[:120]
            except (TypeError, ValueError):
                signature = "(*args, **kwargs)"
            if callable(thing) and line:
                yield f"{module.__name__}.{name}{signature}", line[0][:90]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _estimate(value: float, half: float, *, up: bool, n: int = 240) -> dict[str, Any]:
    return {"estimate": value, "low": value - half, "high": value + half, "level": 0.95, "n": n, "higher_is_better": up}


def evaluation(number: int, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Version 1 beats the base; version 2 beats version 1 on corrections and equals it elsewhere."""

    def both(base: float, champion: float | None, mine: float, half: float, up: bool) -> dict[str, Any]:
        return {
            "candidate": _estimate(mine, half, up=up),
            "base": _estimate(base, half, up=up),
            "champion": _estimate(champion, half, up=up) if champion is not None else None,
            "vs_base": _estimate(mine - base, half * 0.8, up=up),
            "vs_champion": _estimate(mine - champion, half * 0.8, up=up) if champion is not None else None,
        }

    gain = 0.0 if number == 1 else 1.0
    then = None if number == 1 else 1.0
    metrics = {
        "loss": both(3.85, then and 2.78, 2.78 - 0.31 * gain, 0.11, False),
        "exact_match": both(0.004, then and 0.087, 0.087 + 0.021 * gain, 0.034, True),
        "token_f1": both(0.18, then and 0.41, 0.41 + 0.05 * gain, 0.03, True),
        "chrf": both(21.4, then and 38.2, 38.2 + 3.4 * gain, 1.6, True),
        "p95_latency_ms": both(612.0, then and 640.0, 651.0, 40.0, False),
        "tokens_per_second": both(41.0, then and 40.2, 39.5, 2.0, True),
    }
    slices = {} if number == 1 else {"source=feedback": {"loss": both(2.42, 2.0, 1.37, 0.12, False)}}
    metrics["chrf"] |= {"hosted": _estimate(44.0, 1.6, up=True), "vs_hosted": _estimate(-2.4, 1.3, up=True)}
    about = {"hosted": {"notes": ["The hosted model is big-2026 at https://api.example.org/v1."]}}
    return {
        "metrics": metrics,
        "unavailable": {"judged_good": "no judge is named"},
        "slices": slices,
        "rows": 240,
        "suites": ["quality", "latency"],
        "about": about,
        "examples": examples,
    }


def seed(conn: Connection, *, requests: int = 420, random_seed: int = 7) -> None:
    """Write it all, and close the windows. The last hour holds the traffic, `requests` of them."""
    rng = random.Random(random_seed)
    now = datetime.now(UTC)
    old, new = known_world(), new_world()
    conn.execute(
        "insert into base (digest, id, revision, tokenizer_digest, template_digest, parameters, dtype)"
        " values (%(d)s, 'builtin:smollm2-135m', 'wheel 0.1.2', %(d)s, %(d)s, 134515008, 'bfloat16')",
        {"d": _BASE},
    )
    for name in (MODEL, "support-intents", "empty-model"):
        conn.execute(versions.SQL["ensure_model"], {"model": name})
    conn.execute("update model set settings = %s where name = %s", [Jsonb({"monitoring": {"keep_text": True}}), MODEL])
    profiles = (_profile(old, rng), _profile(old + new, rng))
    _runs(conn, now, rng)
    for number, made in ((1, now - 55 * _MINUTE), (2, now - 21 * _MINUTE)):
        _version(conn, MODEL, number, made, profiles[number - 1], old if number == 1 else new)
    _version(conn, "support-intents", 1, now - timedelta(days=3), profiles[0], old, gate="underpowered")
    _ledger(conn, now)
    _traffic(conn, now, rng, old, new, profiles, requests)
    while windows.close(conn).events:
        pass
    _verdicts(conn, now)
    _alerts(conn, now)
    _rescorings(conn)


def _profile(pairs: Sequence[tuple[str, str]], rng: random.Random) -> Profile:
    questions = [(ask(q), len(q) // 3) for q, _ in pairs]
    answers = [(ask(q), _answer(a, rng), len(q) // 3) for q, a in pairs]
    return build(questions, answers, [min(1.0, max(0.0, rng.gauss(0.45, 0.15))) for _ in pairs])


def _answer(text: str, rng: random.Random) -> Answer:
    return Answer(
        text=text,
        completion_tokens=max(1, len(text) // 4),
        finish_reason="stop",
        mean_logprob=-abs(rng.gauss(0.8, 0.3)),
    )


def _version(
    conn: Connection, model: str, number: int, made: datetime, profile: Profile, pairs: Sequence[tuple[str, str]],
    gate: str = "pass",
) -> None:  # fmt: skip
    data = _DATA[number - 1]
    conn.execute(
        "insert into dataset (digest, model, counts, sources, parent) values (%s, %s, %s, %s, %s)"
        " on conflict do nothing",
        [
            data, MODEL, Jsonb({"train": 900, "validation": 110, "test": 240}),
            Jsonb([{"path": "docstrings.jsonl", "digest": _BASE, "rows": 1250, "origin": "standard library"}]),
            _DATA[0] if number == 2 else None,
        ],
    )  # fmt: skip
    examples = [
        {"messages": ask(q), "expected": a, "candidate": a.replace("the", "a"), "base": "I can help with that.",
         "champion": a[:20] if number == 2 else None}
        for q, a in pairs[:4]
    ]  # fmt: skip
    examples.append({"messages": ask(HOSTILE), "expected": HOSTILE, "candidate": HOSTILE, "base": "", "champion": None})
    found = evaluation(number, examples)
    reasons = {
        "pass": ["exact_match against champion: not worse by 0.03 or more, with 95 % confidence (240 rows)",
                 "p95_latency_ms: 651 ms is at most 2000 ms"],
        "underpowered": ["exact_match: 40 rows cannot tell a loss of 0.03; 310 are needed"],
    }[gate]  # fmt: skip
    run = conn.execute(
        "select id from run where model = %s and version is not distinct from %s", [model, number]
    ).fetchone()
    conn.execute(
        versions.SQL["insert"],
        {
            "model": model, "number": number, "bundle_digest": f"sha256:{number}" + "e" * 63, "base_digest": _BASE,
            "dataset_digest": data, "method": "lora", "study": f"{model}-s{number}" if run else None,
            "run_id": run["id"] if run else None, "mlflow_run_id": f"{number}" * 32, "mlflow_model_id": None,
            "manifest": Jsonb({"format": 1, "trial": 5, "code_version": "0.1.0+g8161be2", "params":
                {"r": 16, "alpha": 32, "learning_rate": 4.7e-4, "target_modules": "all-linear", "steps": 90},
                "prompt": {"system": f"Write one line. {HOSTILE}"}}),
            "metrics": Jsonb({"exact_match": 0.087}),
            "evaluation": versions.keep_evidence(conn, "evaluation", found),
            "gate": versions.keep_evidence(conn, "gate", {"decision": gate, "reasons": reasons, "gates": []}),
            "profile": Jsonb(profile.to_json()), "imported_by": None,
        },
    )  # fmt: skip
    conn.execute("update version set created_at = %s where model = %s and number = %s", [made, model, number])


def _runs(conn: Connection, now: datetime, rng: random.Random) -> None:
    for number, kind, state, ago in (
        (1, "train", "completed", 70),
        (2, "retrain", "completed", 30),
        (None, "train", "running", 2),
    ):
        study, run = f"{MODEL}-s{number or 3}", uuid.uuid4()
        started = now - ago * _MINUTE
        spec = {"trials": 9 if number else 18, "rungs": [10, 30, 90], "reduction": 3,
                "objectives": ["loss", "adapter_parameters"] if number == 2 else ["loss"],
                "space": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}}  # fmt: skip
        conn.execute(
            "insert into study (name, model, spec, state, stopped_by, created_at) values (%s, %s, %s, %s, %s, %s)",
            [study, MODEL, Jsonb(spec), "completed" if number else "running", "trials" if number else None, started],
        )
        conn.execute(
            "insert into run (id, model, kind, state, fingerprint, config, config_path, token, study, version,"
            " flow_run_id, mlflow_run_id, result, started_at, finished_at)"
            " values (%s, %s, %s, %s, 'f', '{}', 'docstrings.yaml', 1, %s, %s, %s, %s, %s, %s, %s)",
            [run, MODEL, kind, state, study, number, uuid.uuid4(), "a" * 32,
             Jsonb({"promoted": True}) if number else None, started, started + 9 * _MINUTE if number else None],
        )  # fmt: skip
        if state == "running":
            conn.execute(
                "insert into lease (name, holder, token, expires_at) values (%s, 'here:1', 1, %s)",
                [f"run:{MODEL}", now + 60 * _MINUTE],
            )
        for name, took in (("prepare", 4.2), ("search", 402.0), ("evaluate", 61.0), ("register", 3.1))[
            : 4 if number else 1
        ]:
            output = {"importances": {"r": 0.22, "learning_rate": 0.61, HOSTILE: 0.17}} if name == "search" else {}
            conn.execute(
                "insert into stage (run_id, name, output, seconds) values (%s, %s, %s, %s)",
                [run, name, Jsonb(output), took],
            )
        for trial in range(8):
            loss, rungs = rng.uniform(2.7, 3.6), 1 + (trial % 3)
            params = {"r": rng.choice([4, 8, 16, 32]), "learning_rate": 10 ** rng.uniform(-4.5, -2.5),
                      "target_modules": rng.choice(["attention", "all-linear", ["q_proj", HOSTILE]])}  # fmt: skip
            for rung in range(rungs):
                conn.execute(
                    "insert into rung_job"
                    " (study, trial, rung, trial_id, pack, params, steps, state, value, tokens, seconds,"
                    " adapter_parameters) values (%s, %s, %s, %s, %s, %s, %s, 'done', %s, 12000, 21, %s)",
                    [
                        study,
                        trial,
                        rung,
                        trial,
                        trial,
                        Jsonb(params),
                        10 * 3**rung,
                        loss + 0.6 / (rung + 1),
                        1000 * params["r"],
                    ],
                )
        if number == 2:
            conn.execute(
                "insert into rung_job (study, trial, rung, trial_id, pack, params, steps, state, value, clone_of)"
                " values (%s, 9, 0, 9, 9, %s, 10, 'pruned', 4.5, 3)",
                [study, Jsonb({"r": 64, "learning_rate": 0.02, "target_modules": "attention"})],
            )
        for trial, state in ((8, "failed"), *(() if number else ((9, "running"), (10, "waiting")))):
            conn.execute(
                "insert into rung_job (study, trial, rung, trial_id, pack, params, steps, state, error)"
                " values (%s, %s, 0, %s, %s, %s, 10, %s, %s)",
                [study, trial, trial, trial,
                 Jsonb({"r": 64, "learning_rate": 0.01, "target_modules": "all-linear"}), state,
                 f"the loss became nan at step 3 {HOSTILE}" if state == "failed" else None],
            )  # fmt: skip


def _ledger(conn: Connection, now: datetime) -> None:
    conn.execute(deployments.SQL["create"], {"model": MODEL})
    actor = "key:4f1c (Ada)"
    story = [
        ("promote", 1, 52, "the gate passed: better than the base on 240 rows"),
        ("promote", 2, 19, "retrained on the corrections"),
        ("rollback", 1, 11, f"trying the way back {HOSTILE}"),
        ("promote", 2, 9, "it was only a rehearsal"),
    ]
    state, previous = deployments.read(conn, MODEL), FIRST_HASH
    for action, to, ago, reason in story:
        after = deployments.apply(state, action=action, slot="champion", to=to, share=None)  # type: ignore[arg-type]
        entry = Entry(
            model=MODEL, generation=after.generation, at=now - ago * _MINUTE, actor=actor, action=action,  # type: ignore[arg-type]
            slot="champion", from_version=state.champion, to_version=to, share=None, reason=reason, forced=False,
            evidence=None, previous_hash=previous,
        )  # fmt: skip
        entry = replace(entry, hash=entry.sealed())
        conn.execute(deployments.SQL["append"], asdict(entry))
        conn.execute(deployments.SQL["update"], {**asdict(after), "at": entry.at})
        state, previous = after, entry.hash


def _traffic(
    conn: Connection, now: datetime, rng: random.Random, old: Sequence[tuple[str, str]], new: Sequence[tuple[str, str]],
    profiles: Sequence[Profile], count: int,
) -> None:  # fmt: skip
    extractors = [Extractor(p) for p in profiles]
    batch = uuid.uuid4()
    conn.execute("insert into event_batch (id, replica, rows) values (%s, %s, %s)", [batch, _REPLICA, count])
    corrected = []
    for index in range(count):
        ago = 50 * (1 - index / count) + rng.random()
        at = now - ago * _MINUTE
        at = at.replace(microsecond=at.microsecond // 1000 * 1000)
        version = 2 if ago <= 9 or 11 < ago <= 19 else 1
        question, truth = rng.choice(new if ago < 33 and rng.random() < 0.75 else old)
        if index % 60 == 5:
            question = truth = HOSTILE
        failed = index % 97 == 11
        answer = _answer(truth if version == 2 else truth[::-1][:60], rng)
        key, stream = uuid7(at, rng), index % 2 == 0
        latency = rng.lognormvariate(5.7 + (0.3 if version == 2 else 0), 0.4)
        conn.execute(
            "insert into request_event (id, at, batch, model, version, slot, status, error, stream, prompt_tokens,"
            " completion_tokens, ttft_ms, latency_ms, engine_seconds, cost_usd, finish_reason, features, messages,"
            " answer)"
            " values (%s, %s, %s, %s, %s, 'champion', %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                key, at, batch, MODEL, version, 503 if failed else 200, "No engine answered." if failed else None,
                stream, len(question) // 3, 0 if failed else answer.completion_tokens,
                latency * 0.3 if stream else None, latency,
                latency / 1500, latency / 1500 / 3600 * 0.1, "error" if failed else "stop",
                extractors[version - 1].features(ask(question), answer, len(question) // 3),
                Jsonb(ask(question.replace("\0", ""))), answer.text,
            ],
        )  # fmt: skip
        if not failed and question != truth and rng.random() < 0.3:
            corrected.append(feedback.Item(request_id=str(key), score=-1 if version == 1 else 1, correction=truth))
    feedback.record(conn, corrected)


def _verdicts(conn: Connection, now: datetime) -> None:
    """As the watcher would have written them: one every four minutes over the ten before."""
    for version, first, last in ((1, 48, 20), (2, 17, 2)):
        for ago in range(first, last, -4):
            at = now - ago * _MINUTE
            key = drift.keep(conn, drift.judge(conn, MODEL, version, at - 20 * _MINUTE, at))
            conn.execute("update verdict set at = %s where id = %s", [at, key])


def _alerts(conn: Connection, now: datetime) -> None:
    verdict = conn.execute(
        "select id, body ->> 'explanation' as said from verdict where version = 1 and verdict = 'drift'"
        " order by at limit 1"
    ).fetchone()
    rows = [
        (MODEL, 1, "drift", "critical", verdict["said"] if verdict else "It moved.", 28, 17),
        (
            MODEL,
            2,
            "p95_latency_ms above",
            "warning",
            "docstring-writer:2: one answer in 20 took 1.2 s or longer, above "
            f"the limit of 1 s (137 requests of the last 15 minutes). {HOSTILE}",
            8,
            None,
        ),
        (
            MODEL,
            2,
            "cost_usd above",
            "info",
            "docstring-writer:2: it cost $0.0012, above the limit of $0.0010 (137 requests of the last 24 hours).",
            26,
            None,
        ),
    ]
    for model, version, rule, severity, message, opened, closed in rows:
        conn.execute(
            "insert into alert (id, model, version, rule, severity, message, opened_at, closed_at)"
            " values (%s, %s, %s, %s, %s, %s, %s, %s)",
            [uuid.uuid4(), model, version, rule, severity, message, now - opened * _MINUTE,
             now - closed * _MINUTE if closed else None],
        )  # fmt: skip
    conn.execute(
        "insert into retrain_request (id, model, verdict, at, state, reason) values (%s, %s, %s, %s, 'started', %s)",
        [uuid.uuid4(), MODEL, verdict["id"] if verdict else None, now - 31 * _MINUTE, "214 corrections are enough"],
    )


def _rescorings(conn: Connection) -> None:
    """Version 1 answers as before, then worse; nobody asked version 2 again."""
    for score, difference, worse in ((0.41, 0.0, 0), (0.22, -0.19, 40)):
        example = {"row": "r", "question": HOSTILE, "expected": HOSTILE, "then": HOSTILE, "now": HOSTILE}
        golden.keep(
            conn,
            MODEL,
            1,
            metric="token_f1",
            rows=200,
            failed=0,
            score=_estimate(score, 0.03, up=True, n=200),
            reference=_estimate(0.41, 0.03, up=True, n=200),
            difference=_estimate(difference, 0.04, up=True, n=200),
            changed={"worse": worse, "better": 0, "examples": [{**example, "score": 0.0, "reference": 1.0}]},
            answers=None,
        )
