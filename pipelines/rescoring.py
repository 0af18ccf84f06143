"""`tunesmith rescore`: the version that serves is asked its golden set again, and held against what it was judged by.

The golden set are the test rows of the version's judgement, asked through the gateway as clients ask, one at a time,
and scored as the judgement scores. What is asked so is no traffic: drift and alerts do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from infra.console import json_option, out, print_json, safe
from infra.db import transaction
from infra.errors import NotFound, Unreachable, UsageError
from infra.settings import get_settings
from monitoring import golden
from pipelines import judging, runs
from pipelines.config_address import Judge
from pipelines.config_evaluation import Evaluation
from pipelines.progress import report
from registry import leases, versions
from registry.datasets import Row
from registry.names import check_model_name
from registry.prompts import with_system
from registry.statistics import mean_ci, paired_difference

MOST = 200  # rows, which are a few minutes' work for an engine that serves others meanwhile
_SECONDS = 600.0  # for one answer
_SHOWN = 20


@click.command()
@click.argument("model")
@json_option
def rescore(model: str, as_json: bool) -> None:
    """Ask the version that serves MODEL its golden set again, and compare with when it was judged."""
    from pipelines.progress import shown
    from registry.desk import only_here

    only_here("rescore")
    with shown():
        found = again(model)
    if as_json:
        print_json(found)
        return
    out.print(safe(golden.in_a_sentence(found)), markup=False)
    for each in found["changed"]["examples"]:
        out.print(safe(f"- {_line(each['question'])}"), markup=False)
        for name in ("expected", "then", "now"):
            out.print(safe(f"    {name + ':':<10}{_line(each[name])}"), markup=False)


def again(model: str) -> dict[str, Any]:
    """What is kept of it (monitoring/golden.py).

    Raises NotFound when nothing serves, UsageError for a version that has no test rows here, Unreachable when the
    gateway, or a judge that scores, does not answer, or more than a tenth of the rows, Conflict while another process
    asks the same.
    """
    version = judging.champion_of(check_model_name(model))
    if version is None:
        raise NotFound(f"No version of {model} serves.", hint="`tunesmith promote MODEL:N --reason TEXT` makes one.")
    with leases.Keeper(f"rescore:{model}", leases.this_process("rescore")) as keeper:
        with transaction() as conn:
            evaluation = versions.evidence(conn, version.evaluation) or {}
            known = evaluation.get("answers") or golden.first_answers(conn, model, version.number)
            made = conn.execute(runs.SQL["config"], {"id": version.run_id}).fetchone()
            decision = versions.evidence(conn, version.gate) or {"gates": (made["gates"] or ()) if made else ()}
        rows = _rows(version, known)
        said = _ask(version, rows, keeper)
        judged = _judge(rows, said, known, made, evaluation, [entry["metric"] for entry in decision.get("gates", ())])
        with transaction() as conn:
            leases.check(conn, keeper.lease)
            return golden.keep(conn, model, version.number, rows=len(rows), failed=said.count(None), **judged)


def _rows(version: versions.Version, known: Mapping[str, str] | None) -> list[Row]:
    from pipelines.evaluation.judgement import choose

    if version.dataset_digest is None:
        raise UsageError(
            f"{version.name} was not trained here: there are no test rows.",
            hint="`tunesmith run` makes versions that have some.",
        )
    rows = judging.golden_rows(version.dataset_digest, known)
    if not rows:
        raise UsageError(f"The data set of {version.name} has no test rows that it was judged by.")
    return choose(rows, MOST, 0)


def _ask(version: versions.Version, rows: Sequence[Row], keeper: leases.Keeper) -> list[str | None]:
    """The answers of the gateway, greedy as the judgement's are; None where there is none."""
    from deploy.auth import create_key, revoke_key
    from pipelines.config_address import Address
    from pipelines.evaluation.address import Client, Unavailable
    from pipelines.evaluation.hosted import MISSING

    url = get_settings().need("gateway_url").rstrip("/")
    address = Address(url=f"{url}/v1", model=version.name, timeout_seconds=_SECONDS)
    most = version.parsed.generation.max_tokens
    said: list[str | None] = []
    with transaction() as conn:
        key = create_key(conn, name=f"rescore of {version.model}", role="service", watched=False)
    try:
        with Client(address, key=key.key) as client:
            for row in rows:
                keeper.raise_if_lost()
                answer = client.ask(with_system(row.prompt, None), max_tokens=most)
                said.append(answer.text.replace("\0", "�") if answer is not None else None)
                report("rescore", f"golden rows of {version.name}", len(said), len(rows))
        if (missing := said.count(None)) > MISSING * len(rows):
            raise Unavailable(f"{missing} of {len(rows)} requests have no answer")
    except Unavailable as error:
        raise Unreachable(
            f"{version.name} was not asked again: {error.why}.", hint="See `tunesmith status` and the gateway's log."
        ) from error
    finally:
        with transaction() as conn:
            revoke_key(conn, key.id)
    return said


def _judge(
    rows: Sequence[Row],
    said: Sequence[str | None],
    known: Mapping[str, str] | None,
    made: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    gates: Sequence[str],
) -> dict[str, Any]:
    """By the first metric of the version's `gates` that scores single answers, that of the judge of the run that `made`
    it too, else by label or token F1."""
    from pipelines.evaluation import scores
    from pipelines.evaluation.suites.judge import METRIC as JUDGED

    expected = [row.answer for row in rows]
    labels = scores.are_labels(expected)
    config = Evaluation.model_validate(made["evaluation"]) if made else Evaluation()
    answers = [text or "" for text in said]
    before = [known[row.id] for row in rows] if known is not None else None
    several = [answers] if before is None else [answers, before]
    by = [scores.score(each, expected, labels=labels, schema=config.answer_schema) for each in several]
    # One that could not judge, or agreed too little with people, is no measure of a version
    trusted = JUDGED in evaluation.get("metrics", {}) and JUDGED not in evaluation.get("doubted", {})
    able = {*by[0], *((JUDGED,) if config.judge is not None and trusted else ())}
    metric = next((name for name in gates if name in able), "label_accuracy" if labels else "token_f1")
    all_answers = {row.id: text for row, text in zip(rows, answers, strict=True)}
    judge: dict[str, Any] | None = None
    if metric == JUDGED and config.judge is not None:
        verdicts, judge = _verdicts(config.judge, rows, several)
        judge["then"] = _then(evaluation, len(rows))
        kept = [n for n in range(len(rows)) if all(each[n] is not None for each in verdicts)]
        scored = [[float(each[n] or 0.0) for n in kept] for each in verdicts]
        rows, answers = [rows[n] for n in kept], [answers[n] for n in kept]
        before = [before[n] for n in kept] if before is not None else None
    else:
        scored = [each[metric] for each in by]
    now = scored[0]
    found = {
        "metric": metric,
        "score": mean_ci(now, higher_is_better=True).to_json(),
        "reference": None,
        "difference": None,
        "changed": {"worse": 0, "better": 0, "examples": []},
        "answers": all_answers,
        "judge": judge,
    }
    if before is None:
        return found
    then = scored[1]
    return found | {
        "reference": mean_ci(then, higher_is_better=True).to_json(),
        "difference": paired_difference(now, then, higher_is_better=True, level=golden.LEVEL).to_json(),
        "changed": _changed(rows, before, answers, then, now),
        "answers": None,
    }


def _verdicts(
    config: Judge, rows: Sequence[Row], several: Sequence[Sequence[str]]
) -> tuple[list[list[float | None]], dict[str, Any]]:
    """Whether the judge calls each of several answers to each row good (1, 0, None without a verdict), and who it is.

    Answers of now and of then are judged in one go: a judge that has changed says nothing of the version so. Raises
    Unreachable where it does not answer, or not readably, more than a tenth of them.
    """
    from pipelines.evaluation.address import Client, Unavailable
    from pipelines.evaluation.hosted import MISSING
    from pipelines.evaluation.suites.judge import Judge as Asking
    from pipelines.evaluation.suites.judge import Question, in_words

    asked = {
        (which, n): Question(question=in_words(row.prompt), expected=row.answer, answer=answers[n])
        for which, answers in enumerate(several)
        for n, row in enumerate(rows)
        if answers[n].strip()  # an empty one is bad, and nobody is asked about it
    }
    try:
        with Client(config) as client:
            judge = Asking(client, config)
            told = judge.verdicts(list(asked.values()), lambda done: report("rescore", "verdicts", done, len(asked)))
        for which in range(len(several)):  # one that loses many may lose the bad ones
            own = [verdict for (of, _), verdict in zip(asked, told, strict=True) if of == which]
            if (missing := own.count(None)) > MISSING * len(own):
                raise Unavailable(f"{missing} of {len(own)} answers have no verdict that can be read")
    except Unavailable as error:
        raise Unreachable(f"The judge did not judge the golden set: {error.why}.") from error
    verdicts = dict(zip(asked, told, strict=True))

    def number(place: tuple[int, int]) -> float | None:
        verdict = verdicts.get(place, False)
        return None if verdict is None else float(verdict)

    found = [[number((which, n)) for n in range(len(rows))] for which in range(len(several))]
    return found, {"served": judge.served, "version": judge.version}


def _then(evaluation: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """Who judged when the version was judged, and what it said of those answers, if all `rows` of them are asked again:
    of a part it may well have said otherwise. None where no judge did."""
    from pipelines.evaluation.suites.judge import METRIC as JUDGED

    about, measured = evaluation.get("about", {}).get("judge"), evaluation.get("metrics", {}).get(JUDGED)
    if not about or not measured:
        return None
    score = measured["candidate"] if len(evaluation.get("answers") or ()) == rows else None
    return {"served": about["served"], "version": about["version"], "score": score}


def _changed(
    rows: Sequence[Row], before: Sequence[str], answers: Sequence[str], then: Sequence[float], now: Sequence[float]
) -> dict[str, Any]:
    """Rows with another score than before, those that lost most first."""
    order = sorted((n for n in range(len(rows)) if abs(now[n] - then[n]) > 1e-9), key=lambda n: now[n] - then[n])
    return {
        "worse": sum(now[n] < then[n] for n in order),
        "better": sum(now[n] > then[n] for n in order),
        "examples": [
            {
                "row": rows[n].id,
                "question": rows[n].prompt[-1]["content"],
                "expected": rows[n].answer,
                "then": before[n],
                "now": answers[n],
                "score": now[n],
                "reference": then[n],
            }
            for n in order[:_SHOWN]
        ],
    }


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:159] + "…"
