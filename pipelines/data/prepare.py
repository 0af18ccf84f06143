"""From files, and corrections that people sent, to a clean data set without leaks between its splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from infra import storage
from infra.db import transaction
from infra.settings import get_settings
from pipelines.config import PipelineConfig, check_files
from pipelines.data import canaries, contamination, quality, split
from pipelines.data.dedup import Alike, repeated
from registry import datasets
from registry.datasets import SPLITS, Dataset, Row, Split

# Raised when the same files would give other rows than before
RECIPE = 2
# Corrections are few: enough of them to judge by, but never more than this share, are kept for the test
_WANTED_TEST_CORRECTIONS = 100
_MOST_TEST_CORRECTIONS = 0.3

Progress = Callable[..., None]
"""Called as ``progress(text, done, total)``; the last two may be left out."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Clean rows, where each stood, the split each was declared for (None: to be split), and what has happened to
    them so far."""

    rows: list[Row]
    places: list[str]
    declared: list[Split | None]
    counts: Counter[str]
    quarantine: list[dict[str, Any]]


def prepare(
    config: PipelineConfig, *, extra: Sequence[Row] = (), old: Dataset | None = None, taught: Sequence[Row] = (),
    progress: Progress | None = None,
) -> Dataset:  # fmt: skip
    """`build`, noted in the database as the model's."""
    dataset = build(config, extra=extra, old=old, taught=taught, progress=progress)
    with transaction() as conn:
        datasets.record(conn, config.model, dataset)
    return dataset


def build(
    config: PipelineConfig, *, extra: Sequence[Row] = (), old: Dataset | None = None, taught: Sequence[Row] = (),
    progress: Progress | None = None,
) -> Dataset:  # fmt: skip
    """The data set of a pipeline; without any work when the same was built before.

    Without `old` it is made from the files (and `extra`); with `old` from the corrections in `extra`, all of the
    old test rows, and ``retrain.replay`` old rows for each new one in train and validation; corrections like rows that
    the adapter to begin from was `taught` before are for training only.

    Raises ConfigError for missing files, UsageError for too many malformed or too few rows.
    """
    check_files(config)
    say = progress or (lambda *_: None)
    recipe = _recipe(config, extra, old) | ({"taught": _digest(taught)} if taught else {})
    note = _note(recipe)
    if (digest := _read(note)) and storage.has("dataset", digest):
        say("the same rows as before: nothing to do", 1, 1)
        return datasets.open_dataset(digest)
    pool = _read_pool(config, extra, say) if old is None else _correction_pool(config, extra)
    splits, counts, leaks = _from_pool(config, pool, say) if old is None else _with_old(config, pool, old, taught)
    split.require({name: len(splits[name]) for name in SPLITS}, "cleaning and splitting")
    if config.data.canaries:
        splits["train"] += canaries.rows(config.data.canaries, config.data.split.seed)
        counts["canaries"] = config.data.canaries
    dataset = datasets.keep(
        splits,
        counts=counts,
        # Rows of the old data set are in this one, and their licences hold on
        sources=[*recipe["sources"], *(s for s in (old.sources if old else ()) if s not in recipe["sources"])],
        recipe=recipe,
        quarantine=pool.quarantine,
        parent=old.digest if old else None,
        contamination=leaks,
    )
    _write(note, dataset.digest)
    return dataset


def _recipe(config: PipelineConfig, extra: Sequence[Row], old: Dataset | None) -> dict[str, Any]:
    """All that the rows depend on, and nothing else: settings, file contents, corrections, the old data set."""
    sources: list[dict[str, Any]] = [
        {"path": path.name, "digest": storage.file_digest(path), "split": name, "origin": "file"}
        | ({"licence": licence} if (licence := config.data.licence_of(path)) else {})
        for name in SPLITS
        for path in getattr(config.data, name)
        if old is None
    ]
    if extra:
        sources.append({"path": "feedback", "digest": _digest(extra), "rows": len(extra), "origin": "feedback"})
    return {
        "format": RECIPE,
        "dedup": config.data.quality.dedup,
        "pii": config.data.quality.pii,
        "max_bad": config.data.quality.max_bad,
        "split": config.data.split.model_dump(),
        "replay": _replay(config) if old else None,
        "old": old.digest if old else None,
        "sources": sources,
    } | ({"canaries": config.data.canaries} if config.data.canaries else {})


def _digest(rows: Sequence[Row]) -> str:
    return f"sha256:{hashlib.sha256(chr(10).join(row.id for row in rows).encode()).hexdigest()}"


def _replay(config: PipelineConfig) -> float:
    return config.retrain.replay if config.retrain else 1.0


def _read_pool(config: PipelineConfig, extra: Sequence[Row], say: Progress) -> Pool:
    rows: list[Row] = []
    places: list[str] = []
    declared: list[Split | None] = []
    counts: Counter[str] = Counter()
    quarantine: list[dict[str, Any]] = []
    every_split_has_a_file = bool(config.data.validation and config.data.test)
    # The test's rows come first: of two equal rows the first one stays, and a judgement must not lose its rows
    for name in ("test", "validation", "train"):
        kept = quality.read_files(
            getattr(config.data, name),
            pii=config.data.quality.pii,
            max_bad=config.data.quality.max_bad,
            refused_to=config.model,
            progress=partial(_say_read, say, name),
        )
        if name == "train":
            for row in extra:
                quality.screen(kept, row.messages, pii=config.data.quality.pii, source=row.source)
        rows += kept.rows
        places += kept.places
        own: Split | None = None if name == "train" and not every_split_has_a_file else name
        declared += [own] * len(kept.rows)
        quarantine += kept.quarantine
        counts.update(read=kept.read, quarantined=len(kept.quarantine), redacted=kept.redacted, private=kept.private)
    return Pool(rows=rows, places=places, declared=declared, counts=counts, quarantine=quarantine)


def _say_read(say: Progress, name: str, done: int) -> None:
    say(f"{name}: {done} rows read")


def _correction_pool(config: PipelineConfig, extra: Sequence[Row]) -> Pool:
    kept = quality.Screened()
    for row in extra:
        quality.screen(kept, row.messages, pii=config.data.quality.pii, source=row.source)
    counts = Counter(read=len(extra), redacted=kept.redacted, private=kept.private)
    unsplit: list[Split | None] = [None] * len(kept.rows)
    return Pool(rows=kept.rows, places=kept.places, declared=unsplit, counts=counts, quarantine=[])


def _from_pool(
    config: PipelineConfig, pool: Pool, say: Progress
) -> tuple[dict[Split, list[Row]], Counter[str], contamination.Record]:
    counts = pool.counts
    alike = Alike(pool.rows, lambda done, total: say("comparing prompts", done, total))
    places: list[Split | None] = list(pool.declared)
    leaks = contamination.leaks(alike, places)
    gone = set(leaks)
    counts.update(f"leaked_{places[leak.judging]}" for leak in leaks.values())
    gone |= _repeats(config, pool.rows, alike, places, counts, gone)

    groups = _groups(alike)
    sizes = Counter(groups[n] for n, place in enumerate(places) if place is None and n not in gone)
    assigned = split.assign(
        sizes,
        # A split that has a file of its own gets nothing from train
        validation=0.0 if config.data.validation else config.data.split.validation,
        test=0.0 if config.data.test else config.data.split.test,
        seed=config.data.split.seed,
    )
    splits: dict[Split, list[Row]] = {name: [] for name in SPLITS}
    for number, row in enumerate(pool.rows):
        if number not in gone:
            splits[places[number] or assigned[groups[number]]].append(replace(row, group=groups[number]))
    learned = sum(place != "test" for place in places)
    return splits, counts, contamination.record(leaks, pool.places, learned)


def _repeats(
    config: PipelineConfig,
    rows: Sequence[Row],
    alike: Alike,
    places: Sequence[Split | None],
    counts: Counter[str],
    leaked: set[int],
) -> set[int]:
    """Rows that say what an earlier row says. Test and validation files lose exact repeats only: what people
    wrote down as a judgement stays as it is."""
    gone = set()
    for number, how in repeated(rows, alike, config.data.quality.dedup, leaked).items():
        if how == "exact" or places[number] in (None, "train"):
            gone.add(number)
            counts["duplicates" if how == "exact" else "near_duplicates"] += 1
    return gone


def _groups(alike: Alike) -> list[str]:
    """For each row the name of its group: the rows whose prompts are alike."""
    names = [hashlib.sha256(alike.keys[root].encode()).hexdigest()[:16] for root in alike.cluster]
    return [names[prompt] for prompt in alike.prompt]


def _with_old(
    config: PipelineConfig, pool: Pool, old: Dataset, taught: Sequence[Row]
) -> tuple[dict[Split, list[Row]], Counter[str], contamination.Record]:
    new, counts = pool.rows, pool.counts
    before = [(name, row) for name in SPLITS for row in old.rows(name) if row.source != canaries.SOURCE]
    alike = Alike([*new, *(row for _, row in before), *taught])
    telling = alike.telling()
    groups = _groups(alike)
    # Who is alike to an old row joins it in its split, training first: the champion may have learned that row.
    # Who is nearly the same as an old test row is a test row.
    pinned: dict[str, Split] = {}
    tested: set[int] = set()
    for number, (name, _) in enumerate(before, len(new)):
        pinned.setdefault(groups[number], name)
        if name == "test":
            tested.update(telling[alike.prompt[number]])
    for group in groups[len(new) + len(before) :]:
        pinned.setdefault(group, "train")
    gone = _repeats(config, new, alike, pool.declared, counts, set())
    sizes = Counter(g for n, g in enumerate(groups[: len(new)]) if n not in gone and g not in pinned)
    share = min(_MOST_TEST_CORRECTIONS, _WANTED_TEST_CORRECTIONS / max(1, sum(sizes.values())))
    assigned = split.assign(
        sizes,
        validation=config.data.split.validation,
        test=max(config.data.split.test, share),
        seed=config.data.split.seed,
    )
    assigned.update(pinned)
    places: list[Split | None] = [
        None if n in gone else "test" if alike.prompt[n] in tested else assigned[groups[n]] for n in range(len(new))
    ]
    asked = {alike.prompt[number] for number in range(len(new))}
    # A correction replaces what was taught before on the same prompt, and nothing is taught of what it now tests
    stale = {n for n, (name, _) in enumerate(before, len(new)) if name != "test" and alike.prompt[n] in asked}
    counts["superseded"] += len(stale)
    places += [None if n in stale else name for n, (name, _) in enumerate(before, len(new))]
    leaks = contamination.leaks(alike, places)
    counts.update(f"leaked_{places[leak.judging]}" for n, leak in leaks.items() if places[n] is not None)

    splits: dict[Split, list[Row]] = {name: [] for name in SPLITS}
    for number, row in enumerate(new):
        if (place := places[number]) is not None and number not in leaks:
            splits[place].append(replace(row, group=groups[number]))
    for name in SPLITS:
        held = [row for n, (_, row) in enumerate(before, len(new)) if places[n] == name and n not in leaks]
        if name == "test":
            splits[name] += held
            continue
        held.sort(key=lambda row: split.position(row.id, config.data.split.seed))
        chosen = held[: max(split.LEAST[name], round(_replay(config) * len(splits[name])))]
        counts["replayed"] += len(chosen)
        splits[name] += chosen
    # What was left out here was put together by us, so it is no fault of the team's files
    return splits, counts, contamination.record({}, [], len(splits["train"]) + len(splits["validation"]))


def _note(recipe: Mapping[str, Any]) -> Path:
    """Where the digest of what a recipe gave is noted."""
    key = hashlib.sha256(orjson.dumps(recipe, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return get_settings().home / "cache" / "datasets" / key


def _read(note: Path) -> str | None:
    return note.read_text().strip() if note.is_file() else None


def _write(note: Path, digest: str) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(".new")
    fresh.write_text(digest)
    fresh.replace(note)
