"""A search that is killed three times ends as one that never was.

    .venv/bin/python tests/benchmarks/killed.py [--short] [--intents FOLDER] [--base BASE]

The whole stack on a home of its own, and `tunesmith run` on rows as `intents.py` reads them: 40 trials of one worker,
without being disturbed, and 40 more of another model, whose run and workers are killed with SIGKILL at a quarter, half
and three quarters of the rungs, and begun again with the same command. Both studies must then be complete, with the
same configurations, rungs and losses, trial for trial, each rung done once, and the same winner. The program fails
otherwise.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from intents import LONG, SHORT, command, home, rows, write

KILLS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="12 trials, fewer rows")
    parser.add_argument("--intents", type=Path, help="a folder with the files of CLINC150")
    parser.add_argument("--base", default="builtin:tiny")
    asked = parser.parse_args()
    trials = 12 if asked.short else 40
    with home(None) as folder:
        write(folder / "rows.jsonl", rows(asked.intents, SHORT if asked.short else LONG)[0])
        command("up", "--detach")
        try:
            calm = search(folder, "calm", trials, asked.base, kills=0)
            killed = search(folder, "killed", trials, asked.base, kills=KILLS)
        finally:
            command("down")
    same = [trial for trial in calm if calm[trial] == killed.get(trial)]
    print(f"{len(same)} of {trials} trials are the same, with their configurations, steps and losses")
    if not len(same) == len(killed) == trials:
        sys.exit(f"That must not be: {[(calm[t], killed.get(t)) for t in calm if t not in same][:2]}")


def search(folder: Path, model: str, trials: int, base: str, *, kills: int) -> dict[int, Any]:
    """A run, killed so many times; what its study then holds of each trial."""
    path = folder / f"{model}.yaml"
    path.write_text(f"""
model: {model}
base: {base}
data: {{train: rows.jsonl, quality: {{max_tokens: 128}}}}
generation: {{max_tokens: 12, temperature: 0}}
tuning:
  trials: {trials}
  max_steps: 90
  workers: 1
  adapters_per_pass: 4
  warm_start: false
  space: {{r: [4, 8, 16], learning_rate: {{low: 1e-4, high: 1e-2, log: true}}, target_modules: [attention, all-linear],
    per_device_train_batch_size: 8}}
evaluation: {{suites: [quality], limit: 24}}
promote: manual
""")
    begun, at = time.monotonic(), []
    for kill in range(kills + 1):
        log = folder / f"{model}-{kill}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", "run", "-c", str(path)], stdout=output, stderr=output
            )
        share = (kill + 1) / (kills + 1)
        while process.poll() is None:
            done = rungs_done(model)
            if kill < kills and done >= share * least_rungs(trials):
                end(process)
                at.append(done)
                break
            time.sleep(0.2)
        process.wait()
    if process.returncode not in (0, 3):  # 3: its gates did not pass
        sys.exit(f"The run ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    [study] = [s for s in command("study", "list", "--json")["studies"] if s["model"] == model]
    shown = command("study", "show", study["name"], "--json")
    print(
        f"{model}: {study['state']}, {study['trials']} trials, {study['rungs_done']} rungs, "
        f"{(time.monotonic() - begun) / 60:.1f} minutes" + (f"; killed with {at} rungs done" if kills else ""),
        flush=True,
    )
    if study["state"] != "completed" or len(at) != kills:
        sys.exit("That must not be.")
    best = shown["best"]
    print(f"  best: trial {best['trial']}, loss {best['value']:.6f} after {best['steps']} steps")
    return {t["trial"]: (t["params"], t["steps"], t["state"], t["loss"]) for t in shown["trials"]}


def rungs_done(model: str) -> int:
    found = command("study", "list", "--json")["studies"]
    return next((s["rungs_done"] for s in found if s["model"] == model), 0)


def least_rungs(trials: int) -> float:
    """Of a study whose third goes on after each of three rungs."""
    return trials * (1 + 1 / 3 + 1 / 9)


def end(process: subprocess.Popen[bytes]) -> None:
    """The run and all its workers, at once."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        os.kill(each.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
