"""Does drift keep what it promises, and what does it cost?

    .venv/bin/python tests/benchmarks/drift.py [--short] [--days N] [--intents FOLDER] [--part a|b|c]
        [--evidently PYTHON]

(a) Quiet days: held-out real requests, in blocks of a few of one kind, in a rhythm of the day, are judged each hour, as
the watcher judges (though it looks more often), over the last day. At most 67 of 1,000 days (binomial, 99 %, of the
promised 5 %) may see an alarm. (b) Detection: requests from another world are mixed in, and the table says after how
many requests of all kinds that was found; 10 % must be found within REQUESTS, a number fixed before the run. (c) What a
comparison of a million rows with a million costs from raw rows (columns of numbers) and from stored windows, and what
it cost to build those, beside scipy's KS and, if there is a PYTHON that has it, Evidently with its fastest tests.

FOLDER has files as those of CLINC150: in scope `*_train.jsonl` and `*_test.jsonl`, out of scope `*_oos_test.jsonl`, in
chat form. Without one the worlds are those of the demo: the standard library's docstrings, and those of numpy and
torch. The program fails when a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from _home import temporary_home
from numpy.typing import NDArray
from scipy import stats

from monitoring import drift, windows
from monitoring.statistics import design_effect
from registry import bases
from registry.embeddings import WordPlaces
from registry.profile import FEATURES, Answer, Extractor, Feature, Profile, build

DAYS, PROMISED = 1000, 0.05
PER_DAY = 1200  # requests
BLOCK = 3  # requests of one kind in a row, on average
WIDTH = 4.0  # hours around a kind's time of the day
SHARES = (0.01, 0.05, 0.1, 0.3)
RUNS, REQUESTS, LOOK = 20, 10_000, 50
PEER = Path(__file__).with_name("drift_peer.py")
INPUTS = [(place, feature) for place, feature in enumerate(FEATURES) if feature.side == "input"]
_SAMPLE = 20_000  # events
_SILENT = Answer(text="", completion_tokens=0)

Bins = NDArray[np.int64]  # of each request (rows) and each input feature (columns); one too many for what is not known


@dataclass(frozen=True)
class World:
    """A version's profile; held-out requests and requests from elsewhere, as bins; of the former the kind of each, and
    at what hour each kind is mostly asked."""

    profile: Profile
    held: Bins
    kinds: Sequence[Sequence[int]]  # the requests of each kind
    hours: NDArray[np.float64]
    foreign: Bins


# --- the worlds ---


def make_world(folder: Path | None) -> World:
    known, held, foreign = _intents(folder) if folder is not None else _docstrings()
    with temporary_home():
        embed = WordPlaces(bases.resolve("builtin:smollm2-135m"))
    profile = build(((_chat(text), _tokens(text)) for text, _ in known), embed=embed)
    extractor = Extractor(profile)
    kinds: dict[str, list[int]] = {}
    for number, (_, kind) in enumerate(held):
        kinds.setdefault(kind, []).append(number)
    # More kinds are asked by day than by night
    random = np.random.default_rng(7)
    hours = (13 + 5 * random.standard_normal(len(kinds))) % 24
    return World(
        profile=profile,
        held=_bins(extractor, [text for text, _ in held]),
        kinds=list(kinds.values()),
        hours=hours,
        foreign=_bins(extractor, foreign),
    )


def _intents(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    def read(name: str) -> list[tuple[str, str]]:
        [file] = [file for file in folder.glob(name) if "oos" in name or "oos" not in file.name]
        rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
        return [(row[-2]["content"], row[-1]["content"]) for row in rows]

    return read("*_train.jsonl"), read("*_test.jsonl"), [text for text, _ in read("*_oos_test.jsonl")]


def _docstrings() -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    from pipelines.docstrings import packages, standard_library

    old = [(p.signature, f"kind {zlib.crc32(p.signature.encode()) % 40}") for p in standard_library()]
    new = packages("numpy", "numpy.linalg", "numpy.fft", "numpy.ma", "torch", "torch.nn.functional")
    mixed = [old[n] for n in np.random.default_rng(1).permutation(len(old))]
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :], [p.signature for p in new]


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _tokens(text: str) -> int:
    return max(1, len(text) // 4)


def _bins(extractor: Extractor, texts: Sequence[str]) -> Bins:
    rows = [extractor.features(_chat(text), _SILENT, _tokens(text)) for text in texts]
    return np.array([[feature.bin(v) if (v := row[place]) == v else feature.bins for place, feature in INPUTS]
                     for row in rows])  # fmt: skip


# --- traffic ---


def hour_of_traffic(world: World, hour: int, random: np.random.Generator) -> NDArray[np.int64]:
    """The requests of an hour of the day, by number: blocks of one kind, kinds by the time of the day."""
    away = np.abs((world.hours[None, :] - np.arange(24)[:, None] + 12) % 24 - 12)
    busy = np.exp(-0.5 * (away / WIDTH) ** 2)
    busy /= busy.sum(0)  # each kind as often on a whole day
    share = busy[hour].sum() / busy.sum()
    wanted, found = int(random.poisson(PER_DAY * share)), []
    weights = busy[hour] / busy[hour].sum()
    while len(found) < wanted:
        rows = world.kinds[random.choice(len(world.kinds), p=weights)]
        begin = random.integers(len(rows))
        for n in range(int(random.geometric(1 / BLOCK))):
            found.append(rows[(begin + n) % len(rows)])
    return np.array(found[:wanted], dtype=np.int64)


def verdict(world: World, live: Sequence[Bins]) -> bool:
    """Whether the watcher would call it drift, of requests in the windows in which they came."""
    counts, effects = {}, {}
    for n, (_, f) in enumerate(INPUTS):
        columns = np.array([np.bincount(window[:, n], minlength=f.bins + 1)[: f.bins] for window in live])
        counts[f.name] = columns.sum(0).tolist()
        effects[f.name] = design_effect(columns.astype(float))
    return any(moved.drifted for moved in drift.compare(world.profile, counts, effects=effects))


def alarms(world: World, days: int, seed: int) -> int:
    """Days with an alarm, of so many after a first one, looked at each hour over the last 24."""
    random = np.random.default_rng(seed)
    window = [hour_of_traffic(world, hour, random) for hour in range(24)]
    found = 0
    for _ in range(days):
        alarm = False
        for hour in range(24):
            window = [*window[1:], hour_of_traffic(world, hour, random)]
            alarm = alarm or verdict(world, [world.held[each] for each in window])
        found += alarm
    return found


def delay(world: World, share: float, seed: int) -> float:
    """After how many requests a share of foreign ones is found, from a quiet day on; infinite beyond REQUESTS."""
    random = np.random.default_rng(seed)
    day = np.concatenate([hour_of_traffic(world, hour, random) for hour in range(24)])
    window, since, hour = world.held[day], 0, 0
    waiting = np.zeros((0, len(INPUTS)), dtype=np.int64)
    while since < REQUESTS:
        while len(waiting) < LOOK:
            waiting = np.concatenate([waiting, world.held[hour_of_traffic(world, hour % 24, random)]])
            hour += 1
        new, waiting = waiting[:LOOK].copy(), waiting[LOOK:]
        foreign = random.random(LOOK) < share
        new[foreign] = world.foreign[random.integers(len(world.foreign), size=int(foreign.sum()))]
        window, since = np.concatenate([window[LOOK:], new]), since + LOOK
        if verdict(world, np.array_split(window, 24)):
            return since
    return math.inf


# --- the parts ---


def quiet_days(world: World, days: int) -> bool:
    print(f"\n(a) {days:,} quiet days of about {PER_DAY} requests, judged each hour over the last 24")
    cores = multiprocessing.cpu_count()
    parts = [(days // cores + (n < days % cores), 100 + n) for n in range(cores)]
    with multiprocessing.Pool(cores) as pool:
        found = sum(pool.starmap(partial(alarms, world), parts))
    most = int(stats.binom.ppf(0.99, days, PROMISED))
    print(f"    {found} days with an alarm; at most {most} may have one: {'holds' if found <= most else 'BROKEN'}")
    return found <= most


def detection(world: World, runs: int) -> bool:
    print(f"\n(b) Requests until a share of foreign ones is found, {runs} runs each, looked at every {LOOK}, over the "
          f"last day's {PER_DAY}; at most {REQUESTS:,}")  # fmt: skip
    print("    share   found   median   9 of 10 within")
    holds = True
    for share in SHARES:
        with multiprocessing.Pool() as pool:
            delays = sorted(pool.map(partial(delay, world, share), range(runs)))
        found = sum(math.isfinite(each) for each in delays)
        late = delays[math.ceil(0.9 * runs) - 1]
        print(f"    {share:5.0%} {found:4d}/{runs:<4d} {statistics.median(delays):7,.0f} {late:10,.0f}")
        holds = holds and not (share == 0.1 and found < 0.9 * runs)
    print(f"    10 % within {REQUESTS:,} requests in nine of ten runs: {'holds' if holds else 'BROKEN'}")
    return holds


def cost(rows: int, rounds: int, evidently: str | None) -> None:
    """Eight columns of numbers and four of categories, alike on both sides but for a little."""
    print(
        f"\n(c) {rows:,} rows against {rows:,}, 8 columns of numbers and 4 of categories; seconds, medians of {rounds}"
    )
    random = np.random.default_rng(3)
    numbers = [f for _, f in INPUTS if f.kind == "number"] + [f for _, f in INPUTS if f.kind == "share"]
    columns = [(f, random.lognormal(2, 1, (2, rows)) if f.kind == "number" else random.beta(1, 9, (2, rows)))
               for f in numbers[:8]]  # fmt: skip
    topic = next(f for _, f in INPUTS if f.name == "topic")
    columns += [(topic, random.integers(0, topic.bins, (2, rows)).astype(float)) for _ in range(4)]

    def binned() -> list[tuple[list[int], list[int]]]:
        return [
            tuple(np.bincount(np.searchsorted(f.edges, side, "right"), minlength=f.bins).tolist() for side in sides)
            for f, sides in columns
        ]  # type: ignore[misc]

    def compared(counts: Sequence[tuple[list[int], list[int]]]) -> None:
        for (f, _), (before, now) in zip(columns, counts, strict=True):
            drift.compare(Profile(histograms={f.name: tuple(before)}), {f.name: now})

    def with_scipy() -> None:
        for f, (before, now) in columns:
            if f.kind != "category":
                stats.ks_2samp(before, now)

    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, work in (("windows are built", binned), ("from raw rows", lambda: compared(binned())),
                           ("scipy's KS on 8 of them", with_scipy)):  # fmt: skip
            seconds.setdefault(name, []).append(_timed(work))
        counts = binned()
        seconds.setdefault("from stored windows", []).append(_timed(partial(compared, counts)))
        if evidently is not None:
            asked = json.dumps({"rows": rows})
            done = subprocess.run([evidently, str(PEER), asked], capture_output=True, text=True, check=True)
            seconds.setdefault("Evidently", []).append(float(done.stdout.splitlines()[-1]))
    seconds["windows as the watcher builds them, event by event"] = [rows * of_an_event(columns)]
    for name, found in seconds.items():
        print(f"    {name}: {statistics.median(found):.4f} s")
    if evidently is not None:
        for name, target in (("from raw rows", 20), ("from stored windows", 1000)):
            ratio = statistics.median(a / b for a, b in zip(seconds["Evidently"], seconds[name], strict=True))
            print(f"    Evidently against ours {name}: {ratio:,.0f}x (target {target:,})")


def of_an_event(columns: Sequence[tuple[Feature, NDArray[np.float64]]]) -> float:
    """Seconds for one event to become a window and be merged, with all else that a window has; of a sample."""
    places = {feature.name: place for place, feature in enumerate(FEATURES)}
    events = []
    for row in range(_SAMPLE):
        features = [float("nan")] * len(FEATURES)
        for feature, (before, _) in columns:
            features[places[feature.name]] = float(before[row])
        events.append({
            "status": 200, "features": features, "messages": None, "ttft_ms": 20.0, "latency_ms": 200.0,
            "slot": "champion", "prompt_tokens": 40, "completion_tokens": 20, "engine_seconds": 0.1, "cost_usd": 1e-5,
        })  # fmt: skip
    return _timed(lambda: windows.total(windows.of_event(event, None) for event in events)) / _SAMPLE


def _timed(work: object) -> float:
    begun = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="less of everything")
    parser.add_argument("--days", type=int, default=DAYS, help="quiet days of (a)")
    parser.add_argument("--intents", type=Path, help="a folder with the files of CLINC150")
    parser.add_argument("--part", choices=["a", "b", "c"], action="append", help="only this one; may be repeated")
    parser.add_argument("--evidently", help="a Python that has Evidently")
    asked = parser.parse_args()
    parts, holds = asked.part or ["a", "b", "c"], True
    if {"a", "b"} & set(parts):
        world = make_world(asked.intents)
        print(f"{len(world.held):,} held-out requests of {len(world.kinds)} kinds, {len(world.foreign):,} foreign ones")
        if "a" in parts:
            holds = quiet_days(world, min(40, asked.days) if asked.short else asked.days)
        if "b" in parts:
            holds = detection(world, 4 if asked.short else RUNS) and holds
    if "c" in parts:
        cost(50_000 if asked.short else 1_000_000, 1 if asked.short else 3, asked.evidently)
    sys.exit(not holds)


if __name__ == "__main__":
    main()
