"""What a run does, stage by stage, in plain functions that know nothing of Prefect.

A stage's output is JSON with digests in it; the things themselves stand in the artifact store. So a stage that
finished can be skipped by any later process, and the next one finds all it needs.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from psycopg.types.json import Jsonb

from infra import storage
from infra.db import transaction
from infra.errors import Conflict, Refused, TunesmithError, UsageError
from infra.settings import get_settings
from pipelines import config as configs
from pipelines import judging, runs, schedules
from pipelines.config_space import largest_rank
from pipelines.evaluation.catalogue import SUITES
from pipelines.plans import Plan, ensure_schedules
from pipelines.progress import report
from registry import (
    approvals,
    bases,
    datasets,
    deployments,
    gates,
    leases,
    lineage,
    mlflow,
    notifications,
    profile,
    rollouts,
    studies,
    versions,
)
from registry.bundle import Generation, canonical_json
from registry.datasets import Row

if TYPE_CHECKING:
    from pipelines.evaluation.judgement import Evaluation

log = logging.getLogger(__name__)
# What a run tells of its search
_BEST = ("trial", "params", "value", "steps", "trials", "pruned", "failed", "stopped_by", "pareto")
Outcome = Literal["promoted", "canary"] | None  # of a version that is registered
BECAME: dict[Outcome, str] = {"promoted": "serves", "canary": "is tried on traffic", None: "is registered"}
_WARM_STARTS = 3, 2  # how many earlier studies a search begins with, and how many configurations of each


@contextmanager
def begin(plan: Plan, *, flow_run_id: uuid.UUID | None) -> Iterator[runs.Run]:
    """The run of a plan, new or resumed, with its MLflow run, which ends as the block does."""
    with runs.begin(
        model=plan.config.model,
        kind=plan.kind,
        fingerprint=plan.fingerprint,
        config=plan.config.jsonable(),
        config_path=str(plan.config_path),
        flow_run_id=flow_run_id,
    ) as run:
        if run.previous_flow_run is not None:
            schedules.crash(str(run.previous_flow_run), "The process died; a later run goes on with its work.")
        if run.resumed:
            report("run", f"goes on with run {run.id} after {', '.join(run.finished) or 'its start'}")
        if run.mlflow_run_id is None:
            tags = {
                "tunesmith.run": str(run.id),
                "tunesmith.kind": plan.kind,
                "tunesmith.config": str(plan.config_path),
            }
            if (there := notifications.page(f"/runs/{run.id}")) is not None:
                tags["mlflow.note.content"] = f"[This run in Tunesmith's console]({there})"
            name = f"{plan.kind} {str(run.id)[:8]}"
            run.note(mlflow_run_id=mlflow.start_run(mlflow.experiment_of(run.model), name, key=str(run.id), tags=tags))
        try:
            yield run
        except BaseException:
            with suppress(TunesmithError):  # MLflow may be what failed
                mlflow.end_run(_mlflow_run(run), "FAILED")
            raise
        mlflow.end_run(_mlflow_run(run), "FINISHED")


def _mlflow_run(run: runs.Run) -> str:
    assert run.mlflow_run_id is not None  # noqa: S101  `begin` sees to it
    return run.mlflow_run_id


def _progress(run: runs.Run, stage: str) -> Callable[..., None]:
    """Tells how far a stage is, and ends its work with Conflict once another run has taken the model."""

    def say(text: str, done: float | None = None, total: float | None = None) -> None:
        run.keeper.raise_if_lost()
        report(stage, text, done, total)

    return say


def prepare(plan: Plan, run: runs.Run) -> dict[str, Any]:
    """Rows to a clean, split data set, and a base to a folder: ``{"dataset", "base", "counts"}``."""

    def work() -> dict[str, Any]:
        from pipelines.data.prepare import prepare as prepare_rows

        say = _progress(run, "prepare")
        if (hosted := judging.hosted_of(plan.config)) is not None:
            judging.address_of(hosted)  # better now than after the data
        say(f"base {plan.config.base.path}")
        old = None
        if plan.kind == "retrain" and plan.champion is not None and plan.champion.dataset_digest is not None:
            old = datasets.open_dataset(plan.champion.dataset_digest)
        if old is not None and plan.champion is not None and plan.champion.parsed.base.id == plan.config.base.path:
            # The very base that serves, though its branch may have moved on: versions are then compared like to like
            base = bases.load(plan.champion.base_digest)
        else:
            base = bases.resolve(plan.config.base.path, plan.config.base.revision)
        taught = _taught(plan, base, old) if old is not None else []
        dataset = prepare_rows(plan.config, extra=plan.corrections, old=old, taught=taught, progress=say)
        too_long = _too_long(plan.config, dataset, base) if plan.config.trains else 0
        counts = dict(dataset.counts) | {"too_long": too_long}
        say(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count), 1, 1)
        return {"dataset": dataset.digest, "base": base.digest, "counts": counts}

    return run.stage("prepare", work)


def _taught(plan: Plan, base: bases.Base, old: datasets.Dataset) -> list[Row]:
    """Rows that the adapter which a retraining begins with has learned, beside those of its own data set: they may not
    judge what comes of it."""
    if (began := _init_bundle(plan, {"base": base.digest})) is None:
        return []
    with transaction() as conn:
        parents = lineage.learned(conn, began)
    return [row for parent in parents if parent.digest != old.digest for row in parent.rows("train")]


def _too_long(config: configs.PipelineConfig, dataset: datasets.Dataset, base: bases.Base) -> int:
    """How many rows the search will leave out; it finds their tokens made."""
    from pipelines.data.tokenise import tokenised

    report("prepare", "rows to tokens")
    most, found = config.data.quality.max_tokens, 0
    for split in ("train", "validation"):
        count = tokenised(dataset, split, base, max_tokens=most, system=config.prompt.system).too_long
        if count:
            text = f"{count} of {dataset.counts[split]} {split} rows are longer than {most} tokens"
            report("prepare", f"{text} (data.quality.max_tokens) and are left out", 1, 1)
        found += count
    return found


def search(plan: Plan, run: runs.Run, data: dict[str, Any]) -> dict[str, Any]:
    """The best adapter of an Optuna study: ``{"study", "trial", "params", "value", "adapter", "importances", ...}``; of
    a prompt on the base, or a hosted model, all of them empty."""

    def work() -> dict[str, Any]:
        if not plan.config.trains:
            report("search", f"none: {'a prompt on the base' if plan.config.hosted is None else 'hosted'}", 1, 1)
            nothing = dict.fromkeys(("study", "trial", "value", "steps", "adapter", "stopped_by"))
            return {**nothing, "params": {}, "trials": 0, "pruned": 0, "failed": 0, "pareto": [], "importances": {}}
        from pipelines.tuning.search import make_spec
        from pipelines.tuning.search import search as run_search

        run.note(study=run.study)
        trials = plan.config.tuning.trials
        if plan.kind == "retrain" and plan.config.retrain:
            trials = plan.config.retrain.trials or trials
        spec = make_spec(
            plan.config,
            study=run.study,
            base_digest=data["base"],
            dataset_digest=data["dataset"],
            rows=data["counts"]["train"],
            trials=trials,
            init_bundle=_init_bundle(plan, data),
            warm_start=_warm_start(plan, run, data["base"], most=max(1, trials // 2)),
        )
        _check_ranks(spec.space)
        best = run_search(spec, progress=_progress(run, "search"), mlflow_parent=run.mlflow_run_id,
                          guard=lambda conn: leases.check(conn, run.keeper.lease))  # fmt: skip
        return best.to_json() | {"importances": _draw(run)}

    return run.stage("search", work)


def _check_ranks(space: Mapping[str, Any]) -> None:
    """Raises UsageError for a space with adapters that no engine here could serve: better now than after the search."""
    highest, most = largest_rank(space), get_settings().max_lora_rank
    if highest > most:
        raise UsageError(
            f"tuning.space has adapters of rank {highest} (PiSSA's is doubled), and engines here serve {most} at most.",
            hint="Lower r in the file, or raise TUNESMITH_MAX_LORA_RANK and the engines' own limit.",
        )


def _draw(run: runs.Run) -> dict[str, float]:
    """Optuna's pictures of the search in MLflow, and how much each parameter mattered; a run does not fail for the
    want of them."""
    from pipelines.tuning import pictures

    try:
        return pictures.log_pictures(run.study, _mlflow_run(run))
    except Exception as error:
        log.warning("the pictures of %s were not drawn", run.study, exc_info=error)
        return {}


def _init_bundle(plan: Plan, data: dict[str, Any]) -> str | None:
    """The bundle whose adapter all trials begin with: the champion's, where the file says so (a retrain's default) and
    it stands on the same base."""
    champion, config = plan.champion, plan.config
    start_from = config.tuning.start_from
    if plan.kind == "retrain":
        start_from = config.retrain.start_from if config.retrain is not None else "base"
    if start_from != "champion" or champion is None or champion.base_digest != data["base"]:
        return None
    adapter = champion.adapter()
    if adapter is None:
        return None
    if json.loads((adapter / "adapter_config.json").read_text()).get("use_dora"):
        log.warning("%s is DoRA, which no training goes on from: trials begin with the base", champion.name)
        return None
    return champion.bundle_digest


def _warm_start(plan: Plan, run: runs.Run, base: str, *, most: int) -> list[dict[str, Any]]:
    """What was best in the model's last studies; at `most` as many, so that there is something left to draw."""
    if not plan.config.tuning.warm_start:
        return []
    with transaction() as conn:
        rows = conn.execute(
            runs.SQL["best_params"],
            {"model": plan.config.model, "study": run.study, "base": base, "most": most}
            | dict(zip(("studies", "each"), _WARM_STARTS, strict=True)),
        ).fetchall()
    return [row["params"] for row in rows]


def evaluate(plan: Plan, run: runs.Run, data: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    """Candidate, base and champion on the same untouched rows: ``{"bundle", "evaluation", "gate", "champion"}``.

    The bundle is sealed here, so that what is registered is what was judged.
    """

    def work() -> dict[str, Any]:
        from pipelines.data import contamination
        from pipelines.evaluation import report as pages
        from pipelines.evaluation import servability
        from pipelines.evaluation.judgement import evaluate as judge
        from pipelines.evaluation.suites import own_texts
        from pipelines.reproduction import recipe

        config, base = plan.config, bases.load(data["base"])
        dataset = datasets.open_dataset(data["dataset"])
        adapter = Path(best["adapter"]) if best["adapter"] is not None else None
        served: dict[str, Any] = {}
        if adapter is not None:
            rows = dataset.rows("validation")
            served["servability"] = servability.check(base, adapter, best["params"], rows, config.prompt.system)
        with transaction() as conn:
            began = studies.get(conn, best["study"])["spec"].get("init_bundle") if best["study"] else None
            parents, untold = lineage.learned(conn, began), lineage.untold(conn, began)
        champion = plan.champion
        hosted = judging.hosted_of(config)
        judged = judge(
            base=base,
            candidate=judging.address_of(hosted, config.hosted.parallel) if hosted and config.hosted else adapter,
            price=hosted.price if hosted else None,
            champion=judging.beside(champion, base) if champion else None,
            golden=judging.golden_of(champion) if champion else None,
            rows=dataset.rows("test"),
            training=judging.taught(dataset, parents) if adapter is not None else (),
            system=config.prompt.system,
            generation=config.generation,
            names=config.evaluation.suites,
            limit=config.evaluation.limit,
            seed=config.evaluation.seed,
            schema=config.evaluation.answer_schema,
            toxicity=config.evaluation.toxicity,
            benchmarks=config.evaluation.benchmarks,
            judge=config.evaluation.judge,
            hosted=config.evaluation.hosted,
            machine=judging.machine_of(config.monitoring.price),
            wanted=[gate.slice for gate in config.gates],
            progress=_progress(run, "evaluate"),
        )
        if adapter is not None:
            found = contamination.of_dataset(dataset, parents, own_texts(config.evaluation.suites), untold)
        else:
            found = contamination.of_prompt(dataset, config.prompt.system)
        evaluation = judged.evaluation | {"dataset": dataset.digest, "contamination": found} | served
        decision = gates.decide(
            [gates.Gate(**gate.model_dump()) for gate in config.gates],
            evaluation,
            on_underpowered=config.on_underpowered,
            first=champion is None,
            required={name: SUITES[name] for name in config.evaluation.required},
        )
        decision = replace(
            decision,
            approvals=config.approvals,
            author=deployments.actor_here(),
            evaluation=storage.text_digest(canonical_json(evaluation)),
            champion=champion.number if champion else None,
            champion_bundle=champion.bundle_digest if champion else None,
        )
        digest = versions.seal(
            versions.VersionDraft(
                model=config.model,
                method=config.method,
                base=base,
                adapter=adapter,
                system=config.prompt.system,
                hosted=hosted,
                generation=Generation(**config.generation.model_dump()),
                dataset=dataset.digest,
                study=best["study"],
                trial=best["trial"],
                params=best["params"],
                training=recipe(best["study"], best) if adapter is not None else None,
                evaluation=evaluation,
                decision=decision,
                profile=_profile(config, base, dataset, judged).to_json(),
                report_html=pages.render(config.model, evaluation, decision.to_json()),
            )
        )
        report("evaluate", f"gate {decision.decision}", 1, 1)
        number = champion.number if champion else None
        return {"bundle": digest, "evaluation": evaluation, "gate": decision.to_json(), "champion": number}

    return run.stage("evaluate", work)


def _profile(
    config: configs.PipelineConfig, base: bases.Base, dataset: datasets.Dataset, judged: Evaluation
) -> profile.Profile:
    """The reference that live traffic is compared with: what was trained on, and what was answered to test rows."""
    from monitoring.feedback import similarity
    from pipelines.data import canaries
    from registry import prompts
    from registry.embeddings import WordPlaces

    embed = None
    if config.hosted is not None:  # it counts tokens itself, and did so for the test rows only
        inputs = [(row.prompt, tokens) for row, tokens in zip(judged.rows, judged.prompt_tokens, strict=True)]
    else:
        tokenizer, embed = bases.load_tokenizer(base.folder), WordPlaces(base)
        rows = [*dataset.rows("train"), *dataset.rows("validation")]
        rows = [row for row in rows if row.source != canaries.SOURCE]
        inputs = [(row.prompt, len(prompts.encode(tokenizer, row.prompt, system=config.prompt.system))) for row in rows]
    judged_rows = list(zip(judged.rows, judged.answers, judged.prompt_tokens, strict=True))
    answers = [(row.prompt, answer, tokens) for row, answer, tokens in judged_rows]
    similarities = [s for row, answer, _ in judged_rows if (s := similarity(answer.text, row.answer)) is not None]
    return profile.build(inputs, answers, similarities, embed)


def register(
    plan: Plan, run: runs.Run, data: dict[str, Any], best: dict[str, Any], judged: dict[str, Any]
) -> dict[str, Any]:
    """The version in the registry, promoted when its policy and its gates say so: what ``run --json`` prints."""

    def work() -> dict[str, Any]:
        version = versions.register(
            judged["bundle"],
            run_id=run.id,
            mlflow_run_id=_mlflow_run(run),
            guard=lambda conn: leases.check(conn, run.keeper.lease),
        )
        run.note(version=version.number)
        _log_evaluation(run, version, judged["evaluation"])
        with transaction() as conn:
            conn.execute(
                runs.SQL["save_model_settings"], {"model": plan.config.model, "settings": Jsonb(plan.settings)}
            )
        outcome, refusal = _promote(plan, version, judged)
        ensure_schedules(plan.config)
        _let_go_of_checkpoints(run.study)
        report("register", f"{version.name} {BECAME[outcome]}", 1, 1)
        return {
            "model": version.model,
            "version": version.number,
            "run_id": str(run.id),
            "study": best["study"],
            "best": {name: best.get(name) for name in _BEST},
            "evaluation": judged["evaluation"],
            "gate": judged["gate"],
            "promoted": outcome == "promoted",
            "canary": outcome == "canary",
            "refusal": refusal,
            "mlflow_url": mlflow.run_url(_mlflow_run(run)),
        }

    return run.stage("register", work)


def _let_go_of_checkpoints(study: str) -> None:
    """The bundle has the winner's adapter; of the rest nobody makes use once a study's run is over."""
    with transaction() as conn:
        given_up = studies.checkpoints(conn, study)
    for digest in given_up:
        storage.remove("checkpoint", digest)


def _log_evaluation(run: runs.Run, version: versions.Version, evaluation: dict[str, Any]) -> None:
    """The run's own metrics in MLflow: each figure, its interval, and its gains."""
    points = [
        (f"{metric}/{who}" + (f"/{end}" if end != "estimate" else ""), float(estimate[end]), 0)
        for metric, measured in evaluation["metrics"].items()
        for who, estimate in measured.items()
        if estimate is not None
        for end in ("estimate", "low", "high")
        if estimate[end] is not None
    ]
    # The version's time, so that a run that goes on sends the same points
    mlflow.log_points(_mlflow_run(run), points, at_ms=int(version.created_at.timestamp() * 1000))


def _promote(plan: Plan, version: versions.Version, judged: dict[str, Any]) -> tuple[Outcome, str | None]:
    """What became of the version, and why it was refused more, if it was."""
    gate = judged["gate"]
    if plan.config.promote == "manual":
        return None, None
    if gate["decision"] != "pass":
        return None, f"the gate's decision is {gate['decision']}"
    actor = f"{deployments.actor_here()} ({plan.kind}:{version.run_id})"
    reason = "; ".join(gate["reasons"])[:1000] or "no gates"
    with transaction() as conn:
        now = deployments.read(conn, version.model)
        if now.champion not in (None, judged["champion"], version.number):
            return None, f"version {now.champion} serves, and was not compared with"
        if plan.config.promote == "canary" and now.champion not in (None, version.number):
            if now.challenger is not None and rollouts.running(conn, version.model) is None:
                return None, f"version {now.challenger} is the challenger, by hand"
            steps = plan.config.rollout.plan()
            try:
                rollouts.begin(conn, version.model, version.number, steps, actor=actor, reason=reason)
            except (Conflict, Refused) as error:  # another one runs, or it is not signed
                return None, f"{error.message} Later: `tunesmith rollout {version.name} --reason TEXT`"
            return "canary", None
        agreed = approvals.of(conn, version.model, version.number)
        if agreed.missing:
            return None, f"{agreed.outstanding()}; then `tunesmith promote {version.name} --reason TEXT`"
        try:
            deployments.promote(
                conn,
                version.model,
                version.number,
                actor=actor,
                reason=reason,
                expect_generation=now.generation,
            )
        except Refused as error:  # it is not signed
            return None, error.message
    return "promoted", None
