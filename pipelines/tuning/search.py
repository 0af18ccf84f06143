"""The search's coordinator: an Optuna study in PostgreSQL, successive halving in rounds, workers that may die.

What happens next is a function of what stands in the database alone (jobs and their values), so a coordinator
that is killed and started again goes on with the same plan. A job is done first and then told, idempotently, to
Optuna and to MLflow.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from infra import storage
from infra.db import Connection, transaction
from infra.errors import Conflict, TunesmithError, Unreachable
from infra.settings import get_settings
from pipelines.tuning import budgets, devices, mirror
from pipelines.tuning import space as spaces
from pipelines.tuning.crew import Crew
from pipelines.tuning.memory import DIED, OUT_OF_MEMORY
from pipelines.tuning.methods import fixed_by
from pipelines.tuning.mirror import Mirror, open_store, open_study
from pipelines.tuning.objectives import Rule, front, measured, pick
from pipelines.tuning.outages import passes, patiently
from pipelines.tuning.spec import StudySpec, packs, reaching, rungs
from registry import bases, halving, studies
from registry.halving import brackets

if TYPE_CHECKING:
    import optuna

    from pipelines.config import PipelineConfig

log = logging.getLogger(__name__)
_POLL = 0.4
_PATIENCE = 300.0  # seconds without the database or MLflow, until the search gives up; its state stays
_COUNT = 2.0  # seconds of a search, that are added to its time at once
_TELL = 30.0  # seconds between reports while nothing changes
_THROUGH = ("trials", "space")  # how a search ends that was not cut short

Progress = Callable[[str, float | None, float | None], None]
Guard = Callable[[Connection], None]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The winner: the lowest validation loss that any trial had at the end of any rung, or what the rule picks from
    the Pareto set where there are several objectives; `pareto` is then that set, as trial, steps and measures.
    `adapter` is a folder with a plain PEFT adapter; `stopped_by` is trials, space (which has no
    more of them), max_minutes, max_tokens, max_usd or user."""

    study: str
    trial: int
    params: dict[str, Any]
    value: float
    steps: int
    adapter: str
    trials: int
    pruned: int
    failed: int
    tokens: int
    seconds: float
    stopped_by: str
    pareto: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_spec(
    config: PipelineConfig, *, study: str, base_digest: str, dataset_digest: str, rows: int, trials: int | None = None,
    init_bundle: str | None = None, warm_start: Sequence[dict[str, Any]] = (),
) -> StudySpec:  # fmt: skip
    """The search that a pipeline file asks for, on `rows` training rows. With `init_bundle`, its
    adapter's rank, alpha and target modules are fixed."""
    tuning, base = config.tuning, bases.load(base_digest)
    space = tuning.space.full(base.parameters)
    spaces.check_parts(space, base)
    usual = spaces.typical(space)  # rungs are steps, the same ones for batches of any size
    per_step = usual["per_device_train_batch_size"] * usual["gradient_accumulation_steps"]
    total = tuning.max_steps or max(1, round(tuning.num_train_epochs * rows / per_step))
    spec = StudySpec(
        study=study,
        model=config.model,
        base=base_digest,
        dataset=dataset_digest,
        system=config.prompt.system,
        max_tokens=config.data.quality.max_tokens,
        trials=trials or tuning.trials,
        rungs=rungs(total, number=tuning.pruning.rungs, reduction=tuning.pruning.reduction),
        reduction=tuning.pruning.reduction,
        finalists=tuning.pruning.finalists,
        space=space,
        sampler=tuning.sampler,
        seed=tuning.seed,
        workers=tuning.workers,
        adapters_per_pass=tuning.adapters_per_pass,
        validation_rows=tuning.validation_rows,
        max_minutes=tuning.budget.max_minutes,
        max_training_tokens=tuning.budget.max_tokens,
        max_usd=tuning.budget.max_usd,
        machine_usd_per_hour=(config.monitoring.price or {}).get("per_machine_hour_usd"),
        init_bundle=init_bundle,
        warm_start=list(warm_start),
        objectives=list(tuning.objectives),
        pick=tuning.pick.model_dump() if tuning.pick else None,
        constraints={name: limit.at_most for name, limit in tuning.constraints.items()},
    )
    adapter = spec.init_adapter()
    return spec if adapter is None else replace(spec, space=space | fixed_by(adapter))


def search(
    spec: StudySpec, *, progress: Progress, mlflow_parent: str | None = None, guard: Guard = lambda _: None
) -> Best:
    """Run a study to its end, or go on with the one of this name, whose own spec then holds.

    `guard` is called in each transaction that decides what becomes of the study, and raises Conflict when that is no
    longer for this process to say. Raises TunesmithError when no trial succeeded, with the causes. On an interrupt the
    workers end and all stays as it is, to be gone on with.
    """
    # The number of workers is part of the plan, and so is kept
    spec = replace(spec, workers=spec.workers or get_settings().search_workers or devices.workers())
    with transaction() as conn:
        row = studies.create(conn, spec.study, spec.model, spec.to_json())
        if row["state"] == "failed":
            studies.resume(conn, spec.study)
    spec = StudySpec.from_json(row["spec"])
    crew = Crew(spec.study, min(spec.workers, spec.trials))
    with contextlib.ExitStack() as over:
        over.callback(crew.dismiss)
        if row["best"] is None:
            crew.muster()  # they load the base while Optuna's tables are opened
        store = patiently(open_store, _PATIENCE)
        over.callback(store.engine.dispose)
        study = patiently(lambda: open_study(spec, store), _PATIENCE)
        mirror = Mirror(spec, study, mlflow_parent)
        if row["best"] is not None:
            # The coordinator that ended it may not have come to tell of it; nor is there whom to, where somebody has
            # deleted the study from Optuna's tables since
            if study.get_trials(deepcopy=False):
                patiently(lambda: mirror.leave_behind(_jobs(spec.study)), _PATIENCE)
            return Best(**row["best"])
        return _Coordinator(spec, crew, study, mirror, progress, guard).run()


class _Coordinator:
    def __init__(
        self, spec: StudySpec, crew: Crew, study: optuna.Study, mirror: Mirror, progress: Progress, guard: Guard
    ) -> None:
        self.spec, self.crew, self.optuna, self.mirror, self.progress = spec, crew, study, mirror, progress
        self.guard = guard
        self.workers = max(1, crew.wanted)
        # The space had no other configuration when so many trials had failed. Where those are tried anew it may have
        self.exhausted_with: int | None = study.user_attrs.get("exhausted")
        self.per_pass: int | None = spec.adapters_per_pass or None  # None until a worker measured it
        self.seen: Any = None  # what the last turn acted on
        self.over = 0
        self.over_at = self.told_at = time.monotonic()  # when a job was last over, and the last report
        self.away_since: float | None = None
        self.counted = time.monotonic()
        # Those of an earlier coordinator's workers that live renew meanwhile, also after an outage
        self.reap_from = self.counted + studies.LEASE_SECONDS / 3

    def run(self) -> Best:
        while True:
            try:
                best = self._turn()
                self.away_since = None
                if best is not None:
                    return best
            except Exception as error:
                self._outlast(error)
            time.sleep(_POLL)

    def _outlast(self, error: Exception) -> None:
        """A database or MLflow that restarts costs some turns and nothing else. Raises any other error, and
        Unreachable when it stays away."""
        if not passes(error):
            raise error
        now = self.counted = time.monotonic()
        self.seen = None
        self.reap_from = now + studies.LEASE_SECONDS  # meanwhile no worker could renew its lease
        if self.away_since is None:
            self.away_since = now
            log.warning("waiting for a service to come back: %s", str(error).splitlines()[0])
        if now - self.away_since > _PATIENCE:
            if isinstance(error, Unreachable):
                raise error
            raise Unreachable("The search's database does not answer.", hint="See `tunesmith status`.") from error

    def _turn(self) -> Best | None:
        """Look at what changed, and act on it; the result when the search is over."""
        self.crew.bury()
        with self._deciding() as conn:
            if time.monotonic() >= self.reap_from:
                studies.reap(conn, self.spec.study)
            row, jobs = studies.get(conn, self.spec.study), studies.jobs(conn, self.spec.study)
            asked = [v for v in studies.variants(conn, self.spec.study) if v.trial is None]
        state, left, self.per_pass = row["state"], None, self.per_pass or row["adapters_per_pass"]
        over = sum(j.state in ("done", "failed") for j in jobs)
        if over > self.over:
            self.over, self.over_at = over, time.monotonic()
            self.crew.progressed()
        if state == "running":
            left = self._seconds_left(row, jobs)
            self._count(left)
            if budget := budgets.used_up(self.spec, jobs, seconds=row["seconds"], workers=self.workers):
                # Unless a person was quicker
                with self._deciding() as conn, contextlib.suppress(Conflict):
                    studies.stop(conn, self.spec.study, by=budget)
                return None
            self.crew.muster()
        seen = (state, self.per_pass, len(asked), [(j.trial, j.rung, j.state, j.token) for j in jobs])
        if seen == self.seen:
            if time.monotonic() - self.told_at > _TELL:
                self._report(jobs, left)
            return None
        if state == "running":
            if self._plan(jobs, asked):
                return self._end(jobs, "space" if self._exhausted(jobs) else "trials")
        elif not any(j.state == "running" for j in jobs):
            return self._end(jobs, row["stopped_by"] or "user")
        self.mirror.tell(jobs)
        self.mirror.log(jobs)
        self._report(jobs, left)
        self.seen = seen
        return None

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[Connection]:
        """A transaction of who still has the study in hand."""
        with transaction() as conn:
            self.guard(conn)
            yield conn

    def _seconds_left(self, row: Mapping[str, Any], jobs: Sequence[studies.Job]) -> float | None:
        return budgets.seconds_left(
            self.spec, jobs, seconds=row["seconds"], workers=self.workers, begins_more=not self._exhausted(jobs),
            since=time.monotonic() - self.over_at,
        )  # fmt: skip

    def _count(self, left: float | None) -> None:
        """Add the time since the last turn to the study's, once in some seconds; none while nobody coordinates it, or
        the database is away."""
        now = time.monotonic()
        if now - self.counted >= _COUNT:
            with self._deciding() as conn:
                studies.went_on(conn, self.spec.study, now - self.counted, left=left)
            self.counted = now

    def _plan(self, jobs: list[studies.Job], asked: Sequence[studies.Variant]) -> bool:
        """Put up what is to be done next; True when all is done.

        Rounds are synchronous: a rung is judged when all its members are through. A group is drawn as soon as the
        first rung of the one before it and all of those before that are, so that no worker is idle while the last of
        a group train; the sampler is shown just that much, whatever else is done by then. Variants that a person
        asked for come first, and are in no group.
        """
        spec = self.spec
        if self.per_pass is None:
            return False
        fates = halving.fates(spec, jobs)
        variants = [j for j in halving.last(jobs) if j.clone_of is not None and fates[j.trial] is None]
        if self._try_variants(jobs, asked, variants):
            return False
        begun = sorted({j.trial for j in jobs if j.clone_of is None})
        through = last_done = first_through = True  # all groups before the last one; it; its first rung
        before: list[int] = []  # trials whose results a draw may see in full
        last: list[int] = []
        for group in brackets(spec):
            members = begun[group.start : group.stop]
            if len(members) < len(group) and not self._exhausted(jobs):
                if not (through and first_through):
                    return False
                seen = [j for j in jobs if j.trial in before or (j.trial in last and j.rung == 0)]
                drawn = self._draw(jobs, len(group) - len(members), seen, members)
                if drawn < len(group) - len(members):
                    self.exhausted_with = _failed(jobs)
                    self.optuna.set_user_attr("exhausted", self.exhausted_with)
                if drawn:
                    return False
            if not members:
                break
            done = self._advance(jobs, members)
            through, before = through and last_done, before + last
            last, last_done = members, done
            first_through = not any(j.trial in members and j.rung == 0 and _open(j) for j in jobs)
        return through and last_done and not variants

    def _exhausted(self, jobs: Sequence[studies.Job]) -> bool:
        return self.exhausted_with is not None and _failed(jobs) >= self.exhausted_with

    def _advance(self, jobs: list[studies.Job], members: list[int]) -> bool:
        """Judge a group's rungs and put up the next one of those that go on; True when none is left to be done."""
        spec, by = self.spec, halving.by_place(jobs)
        for rung in range(len(spec.rungs)):
            here = halving.standing(spec, by, members, rung)
            if here is None:
                return False
            chosen = halving.chosen(spec, here) if rung + 1 < len(spec.rungs) else []
            if missing := [j for j in chosen if (j.trial, rung + 1) not in by]:
                self._put_up([(j.trial, j.trial_id, j.params, j.checkpoint) for j in missing], rung + 1)
                return False
        return True

    def _try_variants(
        self, jobs: Sequence[studies.Job], asked: Sequence[studies.Variant], going: Sequence[studies.Job]
    ) -> bool:
        """Put up the variants that were asked for, and the next rung of those that earned it; whether there were
        any. They train alone."""
        for variant in asked:
            wanted = {variant.number: variant.params}
            known = mirror.begin(self.optuna, self.spec.space, mirror.VARIANT, wanted, clone_of=variant.clone_of)
            trial = known[variant.number]
            with self._deciding() as conn:
                studies.add_job(
                    conn, self.spec.study, trial=trial.number, rung=0, trial_id=trial._trial_id, params=variant.params,
                    steps=self.spec.rungs[0], checkpoint=None, clone_of=variant.clone_of,
                )  # fmt: skip
                studies.variant_begun(conn, self.spec.study, variant, trial.number)
        onward = [j for j in going if j.state == "done" and halving.goes_on(self.spec, jobs, j)]
        with self._deciding() as conn:
            for j in onward:
                studies.add_job(
                    conn, self.spec.study, trial=j.trial, rung=j.rung + 1, trial_id=j.trial_id, params=j.params,
                    steps=self.spec.rungs[j.rung + 1], checkpoint=j.checkpoint, clone_of=j.clone_of,
                )  # fmt: skip
        return bool(asked or onward)

    def _put_up(self, trials: Sequence[tuple[int, int, dict[str, Any], str | None]], rung: int) -> None:
        """Jobs for trials (number, Optuna's id, params, checkpoint), in packs, all or none."""
        assert self.per_pass is not None  # noqa: S101  nothing is planned before
        leaders = packs([(t[0], t[2]) for t in trials], most=self.per_pass, workers=self.crew.wanted)
        with self._deciding() as conn:
            for number, trial_id, params, checkpoint in trials:
                studies.add_job(
                    conn, self.spec.study, trial=number, rung=rung, trial_id=trial_id, params=params,
                    steps=self.spec.rungs[rung], checkpoint=checkpoint, pack=leaders[number],
                )  # fmt: skip

    def _draw(
        self, jobs: Sequence[studies.Job], number: int, seen: Sequence[studies.Job], members: Sequence[int]
    ) -> int:
        """Draw configurations that were not drawn before, have Optuna know them, and put them up; how many there were.
        `members` of the group that were put up already."""
        from pipelines.tuning import draws

        self.mirror.tell(jobs)
        spec = self.spec
        known = [j.params for j in jobs if j.rung == 0]
        begun = [j.params for j in jobs if j.rung == 0 and j.trial in members]
        beyond = [j.params for j in seen if j.state == "failed" and str(j.error).startswith(OUT_OF_MEMORY)]
        # Workers die of other things too: not of memory where what needs as much was done
        done = [j.params for j in seen if j.state == "done"]
        killed = [j.params for j in seen if j.state == "failed" and str(j.error).startswith(DIED)]
        beyond += [params for params in killed if not any(as_large(other, params) for other in done)]

        def new(params: Mapping[str, Any]) -> bool:
            return params not in known and not any(as_large(params, other) for other in beyond)

        first = sum(j.rung == 0 and j.clone_of is None for j in jobs)
        drawn: dict[int, dict[str, Any]] = {}  # by place, whatever a person had tried in between
        for place in range(first, first + number):
            params = draws.find(spec, place, seen=seen, begun=begun, wanted=new)
            if params is None:
                break
            drawn[place] = params
            known.append(params)
            begun.append(params)
        if drawn:
            asked = mirror.begin(self.optuna, spec.space, mirror.PLACE, drawn)
            self._put_up([(asked[n].number, asked[n]._trial_id, params, None) for n, params in drawn.items()], 0)
        return len(drawn)

    def _report(self, jobs: Sequence[studies.Job], left: float | None) -> None:
        self.told_at = time.monotonic()
        spec = self.spec
        done = [j for j in jobs if j.state in ("done", "failed")]
        total = reaching(spec)
        able = (j for j in done if j.value is not None and halving.may_win(spec, j))
        best = min(able, key=halving.loss, default=None)
        begun = len({j.trial for j in jobs if j.clone_of is None})
        text = f"{begun} of {spec.trials} trials begun"
        if variants := len({j.trial for j in jobs if j.clone_of is not None}):
            text += f", {variants} by hand"
        if failed := sum(j.state == "failed" for j in jobs):
            text += f", {failed} failed"
        if best is not None:
            text += f", best loss {best.value:.3f} (trial {best.trial}, {best.steps} steps)"
        if left is not None:
            text += f", about {max(1, round(left / 60))} min left"
        self.progress(text, len(done), sum(total) + sum(j.clone_of is not None for j in jobs))

    def _end(self, jobs: Sequence[studies.Job], stopped_by: str) -> Best | None:
        """The result, written down; None when it is not over yet: a person asked for one more trial at the last moment,
        or had the search go on, or what was best is damaged."""
        done = [j for j in jobs if j.value is not None]  # also of what was pruned by hand after it was measured
        failed = [j for j in jobs if j.state == "failed"]
        if not done:
            # What a person stopped stays so until a person has it go on
            if not self._close_study(jobs, "stopped" if stopped_by == "user" else "failed", stopped_by, None):
                return None
            if stopped_by == "user" and not failed:
                raise TunesmithError(
                    f"{self.spec.study} was stopped before any trial was measured.",
                    hint="`tunesmith study resume` and the same `tunesmith run` go on with it.",
                )
            causes = (
                "; ".join(sorted({j.error or "unknown" for j in failed})) or f"the search was stopped by {stopped_by}"
            )
            raise TunesmithError(
                f"No trial of {self.spec.study} succeeded: {causes}.", hint="Mend tuning.space, or raise the budget."
            )
        rows = measured(jobs)
        rule = Rule(**self.spec.pick) if self.spec.pick else None
        try:
            winner = rows[pick([m for _, m in rows], self.spec.objectives, rule, self.spec.constraints)][0]
        except TunesmithError:  # no trial keeps the constraints
            if not self._close_study(jobs, "failed", stopped_by, None):
                return None
            raise
        last = halving.last(jobs)
        assert winner.checkpoint is not None  # noqa: S101  a done job has one
        if not storage.sound("checkpoint", winner.checkpoint):
            log.warning("trial %d, the best one, is left out: its checkpoint is damaged or gone", winner.trial)
            with self._deciding() as conn:
                studies.spoil(conn, winner, error="its checkpoint is damaged or gone")
            return None
        top = len(self.spec.rungs) - 1
        best = Best(
            study=self.spec.study,
            trial=winner.trial,
            params=winner.params,
            value=halving.loss(winner),
            steps=winner.steps,
            adapter=str(storage.get("checkpoint", winner.checkpoint) / "adapter"),
            trials=len(last),
            pruned=sum(j.state != "failed" and not (j.state == "done" and j.rung == top) for j in last),
            failed=len(failed),
            tokens=sum(j.tokens or 0 for j in jobs),
            seconds=sum(j.seconds or 0.0 for j in jobs),
            stopped_by=stopped_by,
            pareto=front(rows, self.spec.objectives, self.spec.constraints),
        )
        state = "completed" if stopped_by in _THROUGH else "stopped"
        if not self._close_study(jobs, state, stopped_by, best):
            return None
        self.progress(f"best loss {best.value:.3f} of {best.trials} trials", 1, 1)
        return best

    def _close_study(self, jobs: Sequence[studies.Job], state: str, stopped_by: str, best: Best | None) -> bool:
        with self._deciding() as conn:
            now = studies.lock(conn, self.spec.study)["state"]
            if stopped_by not in _THROUGH and now == "running":  # resumed meanwhile
                return False
            if stopped_by in _THROUGH and any(v.trial is None for v in studies.variants(conn, self.spec.study)):
                return False
            row = best.to_json() if best else None
            studies.end(conn, self.spec.study, state=state, stopped_by=stopped_by, best=row)
        self.mirror.leave_behind(jobs)  # not before: who is resumed goes on with them
        return True


def _jobs(study: str) -> list[studies.Job]:
    with transaction() as conn:
        return studies.jobs(conn, study)


def as_large(params: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a configuration needs at least the memory that another does."""
    same = ("use_dora", "init_lora_weights", "target_modules", "layers_to_transform")
    return all(params.get(name) == other.get(name) for name in same) and all(
        params[name] >= other[name] for name in ("r", "per_device_train_batch_size")
    )


def _failed(jobs: Sequence[studies.Job]) -> int:
    return sum(job.state == "failed" for job in jobs)


def _open(job: studies.Job) -> bool:
    return job.state in ("waiting", "running")
