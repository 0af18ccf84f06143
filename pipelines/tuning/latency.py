"""How long a token of an answer takes when a trial's adapter serves it, measured by the worker that trained it.

One request alone, in the form and by the loop of our own engine, on the base that the worker has. Processor time, on a
GPU wall time: what else the machine does should not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.settings import get_settings
from registry import bases
from registry.bases import Base

_PROMPT, _WARM, _STEPS = 32, 3, 12  # tokens


class Stopwatch:
    """Measures adapters beside a model that is not training meanwhile. Belongs to one thread."""

    def __init__(self, model: Any, base: Base, prompt: Sequence[int]) -> None:
        from deploy.adapters import Adapters

        self.model, self.prompt = model, list(prompt[:_PROMPT])
        self.tokenizer = bases.load_tokenizer(base.folder)
        self.adapters = Adapters(model, max_rank=get_settings().max_lora_rank)
        self._measured = 0
        self._clock = time.perf_counter if model.device.type == "cuda" else time.process_time

    def milliseconds(self, adapter: Path) -> float:
        """The median over the tokens of one answer, with the plain PEFT adapter in a folder. Raises TunesmithError for
        one that no engine takes."""
        from deploy.decoding import Batch, Request
        from deploy.sampling import Sampling

        self._measured += 1
        name = f"trial-{self._measured}"  # a name never gets another meaning
        self.adapters.load(name, adapter)
        try:
            batch = Batch(self.model, self.tokenizer, self.adapters, max_rows=1, max_cells=_PROMPT + 2 * _STEPS)
            sampling = Sampling(max_tokens=1 + _WARM + _STEPS, temperature=0.0, ignore_eos=True)
            row = batch.row(Request(prompt=self.prompt, adapter=name, sampling=sampling))
            batch.join(row)
            taken = []
            while row.finish is None:
                begun = self._clock()
                batch.step()
                taken.append(1000 * (self._clock() - begun))
            return statistics.median(taken[_WARM:])
        finally:
            self.adapters.remove(name)
