"""What a version is judged beside, and by: the champion, a hosted model, the machine's price; and how one that is
registered is judged again."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from infra import storage
from infra.db import transaction
from infra.errors import NotFound, TunesmithError, UsageError
from infra.settings import get_settings
from pipelines import config as configs
from pipelines import config_evaluation, runs
from pipelines.config_address import Address
from pipelines.evaluation.catalogue import DEFAULT, METRICS, SUITES
from pipelines.progress import report
from registry import bases, datasets, deployments, gates, judgements, lineage, mlflow, upstreams, versions
from registry.bundle import Hosted, canonical_json
from registry.datasets import Row
from registry.pricing import MachinePrice, parse_price

if TYPE_CHECKING:
    from pipelines.evaluation.judgement import Serving

log = logging.getLogger(__name__)
_OF_TRAINING = ("training_text_repeated", "secrets_repeated", "canaries_remembered")


class Policy(BaseModel):
    """What a version is judged by, of a pipeline file or of the configuration that a run kept."""

    evaluation: config_evaluation.Evaluation = Field(default_factory=config_evaluation.Evaluation)
    gates: tuple[config_evaluation.Gate, ...] = ()
    approvals: int = 0
    on_underpowered: Literal["refuse", "ask"] = "refuse"


def champion_of(model: str) -> versions.Version | None:
    """The version that serves a model now."""
    with transaction() as conn:
        try:
            number = deployments.read(conn, model).champion
        except NotFound:
            return None
        return versions.get(conn, model, number) if number is not None else None


def beside(champion: versions.Version, base: bases.Base) -> Serving:
    """A champion as candidates of a base are judged beside it. Raises NotFound when it stands on another base, which
    is not here, or at an address that is not known."""
    from pipelines.evaluation.answers import Elsewhere
    from pipelines.evaluation.judgement import Serving

    hosted = champion.parsed.hosted
    where: Address | Path | Elsewhere | None = champion.adapter()
    if hosted is not None:
        where = address_of(hosted)
    elif champion.base_digest != base.digest:
        where = Elsewhere(bases.load(champion.base_digest), champion.adapter())
    price = hosted.price if hosted is not None else None
    return Serving(adapter=where, system=champion.parsed.prompt.system, price=price)


def golden_of(version: versions.Version) -> list[Row] | None:
    """The golden set of a version, as `golden_rows`; None where its data set is not in this store."""
    if version.dataset_digest is None or not storage.has("dataset", version.dataset_digest):
        return None
    with transaction() as conn:
        evaluation = versions.evidence(conn, version.evaluation) or {}
    return golden_rows(version.dataset_digest, evaluation.get("answers"))


def golden_rows(dataset: str, known: Mapping[str, str] | None) -> list[Row]:
    """The test rows of a data set that a version was judged by: those that it has `known` answers to, or where none
    were kept, all that ask something of their own."""
    from pipelines.evaluation.judgement import apart_from_each_other

    rows = datasets.open_dataset(dataset).rows("test")
    return [row for row in rows if row.id in known] if known else apart_from_each_other(rows, 0)


def hosted_of(config: configs.PipelineConfig) -> Hosted | None:
    """What the file's version is answered by, as it will stand in the bundle."""
    if config.hosted is None:
        return None
    return Hosted(
        models=config.hosted.models,
        price=config.hosted.price.tokens if config.hosted.price is not None else None,
    )


def address_of(hosted: Hosted, parallel: int = 4) -> Address:
    """Where the first of a version's models is asked, once all have an address. Raises NotFound."""
    first = hosted.models[0]
    with transaction() as conn:
        upstreams.check(conn, hosted)
        there = upstreams.get(conn, first.upstream)
    return Address(
        url=there.url,
        model=first.model,
        key_env=there.key_env,
        timeout_seconds=there.timeout_seconds,
        options=first.options,
        parallel=parallel,
    )


def machine_of(price: Mapping[str, float] | None) -> MachinePrice:
    """The machine's price of the file, or where it prices tokens, or nothing, of the settings."""
    own = parse_price(price) if price else None
    return (
        own if isinstance(own, MachinePrice) else MachinePrice(per_machine_hour_usd=get_settings().machine_usd_per_hour)
    )


def taught(dataset: datasets.Dataset, parents: Sequence[datasets.Dataset]) -> list[Row]:
    """The rows that a version has learned from, of its own data set and of those of what it began from, each once."""
    rows = {row.id: row for each in (dataset, *parents) for row in each.rows("train")}
    return list(rows.values())


def judge_again(
    name: str, suites: Sequence[str] = (), config: Path | None = None, *, attach: str | None = None
) -> dict[str, Any]:
    """The evaluation of a registered version on the test rows it was judged on, beside its base and, if it is another
    version, the champion. Schema, classifier, judge, hosted model and gates are those of the run that made it, or
    of a pipeline file, whose test rows it answers if it has none here; what is attached is by the gates of both, those
    of a version from elsewhere as they stand in its decision, and by the file's scorers only where its own has none::

        {"evaluation": ..., "gate": the contamination's entry of a gate decision, None where nobody can tell}

    Nothing is changed, unless there is a reason to `attach` it: the version's gates speak by it from then on, and
    "decision" says how.

    Raises NotFound for no such version, UsageError when there are no rows to judge by, no gates to attach, or a suite
    is not known, ConfigError for a file with problems.
    """
    from pipelines.data import contamination
    from pipelines.evaluation.judgement import evaluate as judge
    from pipelines.evaluation.report import render
    from pipelines.evaluation.suites import own_texts

    if unknown := [s for s in suites if s not in SUITES]:
        raise UsageError(f"There is no suite {unknown[0]}.", hint=f"There are {', '.join(SUITES)}.")
    if attach is not None:
        deployments.check_reason(attach, required=True)
    model, number = versions.parse_version(name)
    with transaction() as conn:
        version = versions.get(conn, model, number)
        made = conn.execute(runs.SQL["config"], {"id": version.run_id}).fetchone()
        before = versions.evidence(conn, version.gate) or {}
        stored = versions.evidence(conn, version.evaluation) or {}
        began = (version.parsed.training or {}).get("init_bundle")
        parents, untold = lineage.learned(conn, began), lineage.untold(conn, began)
    given = configs.load(config) if config is not None else None
    brought = None if made else _policy_of(before, stored)
    policy = _policy(made, given, keep=attach is not None, brought=brought)
    now = champion_of(model)
    if attach is not None and now is not None and now.number == number:
        raise UsageError(f"{version.name} serves: what its gates say decides nothing now.", hint="Leave --attach out.")
    if attach is not None and policy is None:
        raise UsageError(f"{version.name} was not made by a run here: there are no gates.", hint="Name a file with -c.")
    dataset = _rows(version, given)
    own = dataset.digest == version.dataset_digest
    wanted = tuple(suites) or (policy.evaluation.suites if attach is not None and policy is not None else DEFAULT)
    of_run = config_evaluation.Evaluation.model_validate(made["evaluation"]) if made else config_evaluation.Evaluation()
    scorers, price = of_run, made["price"] if made else None
    if given is not None:
        scorers = _scorers(of_run if attach is not None else None, given.evaluation)
        price = (price if attach is not None else None) or given.monitoring.price
    asked = of_run if own or given is None else given.evaluation
    other = now if now is not None and now.number != number else None
    adapter, at_address = version.adapter(), version.parsed.hosted
    base = bases.load(version.base_digest)
    evaluation = judge(
        base=base,
        candidate=address_of(at_address) if at_address is not None else adapter,
        price=at_address.price if at_address is not None else None,
        champion=beside(other, base) if other is not None else None,
        golden=golden_of(other) if other is not None else None,
        rows=dataset.rows("test"),
        training=taught(dataset, parents) if adapter is not None and own else (),
        system=version.parsed.prompt.system,
        generation=version.parsed.generation,
        names=wanted,
        limit=asked.limit,
        seed=asked.seed,
        schema=scorers.answer_schema,
        toxicity=scorers.toxicity,
        benchmarks=scorers.benchmarks,
        judge=scorers.judge,
        hosted=scorers.hosted,
        machine=machine_of(price),
        wanted=[gate.slice for gate in policy.gates] if policy is not None else (),
        progress=partial(report, "evaluate"),
    ).evaluation
    evaluation["dataset"] = dataset.digest
    if not own and adapter is not None:
        for metric in _OF_TRAINING:
            if evaluation["not_applicable"].pop(metric, None):
                evaluation["unavailable"][metric] = "what it was trained on is not known here"
    if own:
        if adapter is not None:
            texts = own_texts(tuple(dict.fromkeys((*wanted, *of_run.suites))))
            clean = contamination.of_dataset(dataset, parents, texts, untold)
        else:
            clean = contamination.of_prompt(dataset, version.parsed.prompt.system)
        evaluation |= {gates.CONTAMINATION: clean}
    elif gates.CONTAMINATION in stored:  # what was found where it was made stays true
        evaluation |= {gates.CONTAMINATION: stored[gates.CONTAMINATION]}
    decision = _decide(policy or Policy(), evaluation, version, beside=other, before=before)
    if attach is not None:
        page = render(model, evaluation, decision.to_json())
        with transaction() as conn:
            judgements.keep(
                conn, model, number, evaluation, decision, actor=deployments.actor_here(), reason=attach, report=page
            )
        if version.mlflow_run_id is not None:
            _show(version.mlflow_run_id, page)
    rows = next((entry for entry in decision.gates if entry["metric"] == gates.CONTAMINATION), None)
    told = {"decision": decision.to_json()} if attach is not None else {}
    return {"evaluation": evaluation, "gate": rows, **told}


def _decide(
    policy: Policy, evaluation: Mapping[str, Any], version: versions.Version, *,
    beside: versions.Version | None, before: Mapping[str, Any],
) -> gates.Decision:  # fmt: skip
    """What a policy says of an evaluation of a version; `before` is what its gates said so far, whose author stays."""
    decision = gates.decide(
        [gates.Gate(**gate.model_dump()) for gate in policy.gates],
        evaluation,
        on_underpowered=policy.on_underpowered,
        first=beside is None,
        required={suite: SUITES[suite] for suite in policy.evaluation.required},
    )
    reasons = decision.reasons
    if gates.CONTAMINATION not in evaluation:
        reasons = [*reasons, f"{gates.CONTAMINATION}: not known, since {version.name} was not trained here"]
    return replace(
        decision,
        reasons=reasons,
        approvals=max(int(before.get("approvals", 0)), policy.approvals),
        author=before.get("author") or deployments.actor_here(),
        evaluation=storage.text_digest(canonical_json(evaluation)),
        champion=beside.number if beside is not None else None,
        champion_bundle=beside.bundle_digest if beside is not None else None,
    )


def _show(run: str, page: str) -> None:
    """Put a later judgement's page beside the first one's in MLflow, whose being away loses nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report-judged-again.html"
        file.write_text(page, encoding="utf-8")
        try:
            mlflow.log_file(run, file)
        except TunesmithError as error:
            log.warning("MLflow has no page of this judgement: %s", error.message)


def _scorers(own: config_evaluation.Evaluation | None, given: config_evaluation.Evaluation) -> Any:
    """Those of a file, but where the version's own run had one: its gates speak of that one."""
    names = ("answer_schema", "toxicity", "benchmarks", "judge", "hosted")
    return given.model_copy(update={name: kept for name in names if own and (kept := getattr(own, name)) is not None})


def _policy_of(before: Mapping[str, Any], stored: Mapping[str, Any]) -> Policy | None:
    """The policy that a decision was made by, as far as it says so and this program knows it; None without one."""
    entries, suite = before.get("gates", ()), "suite "
    if not entries:
        return None
    fields = config_evaluation.Gate.model_fields
    known = [e for e in entries if e["metric"] in METRICS or e["metric"] == gates.CONTAMINATION]
    required = [e["metric"].removeprefix(suite) for e in entries if e["metric"].startswith(suite)]
    suites = [name for name in dict.fromkeys(["quality", *stored.get("suites", ()), *required]) if name in SUITES]
    try:
        return Policy(
            evaluation=config_evaluation.Evaluation(
                suites=tuple(suites), required=tuple(name for name in required if name in SUITES)
            ),
            gates=tuple(config_evaluation.Gate(**{name: e[name] for name in fields if name in e}) for e in known),
            approvals=before.get("approvals", 0),
        )
    except ValueError as error:
        raise UsageError("The gates that this version brought with it are none that could be decided by.") from error


def _policy(
    made: Mapping[str, Any] | None, given: configs.PipelineConfig | None, *, keep: bool, brought: Policy | None = None
) -> Policy | None:
    """By what gates are decided: those of a file, else those of the run that made the version, or those that it brought
    with it. A judgement that is to be kept is by both, or a file could wave through what a version's own gates
    refused."""
    own = Policy.model_validate({name: made[name] for name in Policy.model_fields if made[name]}) if made else brought
    if given is None:
        return own
    fresh = Policy(
        evaluation=given.evaluation,
        gates=given.gates,
        approvals=given.approvals,
        on_underpowered=given.on_underpowered,
    )
    if own is None or not keep:
        return fresh
    more = [gate for gate in fresh.gates if gate not in own.gates and gate.metric != gates.CONTAMINATION]
    both = {
        name: tuple(dict.fromkeys([*getattr(own.evaluation, name), *getattr(fresh.evaluation, name)]))
        for name in ("suites", "required")
    }
    return Policy(
        evaluation=fresh.evaluation.model_copy(update=both),
        gates=(*own.gates, *more),
        approvals=max(own.approvals, fresh.approvals),
        on_underpowered=own.on_underpowered,
    )


def _rows(version: versions.Version, given: configs.PipelineConfig | None) -> datasets.Dataset:
    """The data set whose test rows judge a version."""
    if version.dataset_digest is not None:
        return datasets.open_dataset(version.dataset_digest)
    if given is None:
        raise UsageError(
            f"{version.name} was not trained here: there are no test rows.",
            hint="Import its data set, or name a pipeline file with test rows of yours: -c FILE.",
        )
    from pipelines.data.prepare import prepare

    return prepare(given, progress=partial(report, "prepare"))
