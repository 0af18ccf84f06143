"""Evidently on as many rows as drift.py compares; prints the seconds. Run by drift.py with a Python that has it."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset


def main() -> None:
    rows = json.loads(sys.argv[1])["rows"]
    random = np.random.default_rng(3)

    def frame() -> pd.DataFrame:
        numbers = {f"n{k}": random.lognormal(2, 1, rows) for k in range(8)}
        return pd.DataFrame(numbers | {f"c{k}": random.integers(0, 33, rows).astype(str) for k in range(4)})

    known = DataDefinition(
        numerical_columns=[f"n{k}" for k in range(8)], categorical_columns=[f"c{k}" for k in range(4)]
    )
    before, now = (Dataset.from_pandas(frame(), data_definition=known) for _ in range(2))
    begun = time.perf_counter()
    Report([DataDriftPreset(method="psi")]).run(now, before).dict()
    print(time.perf_counter() - begun)


if __name__ == "__main__":
    main()
