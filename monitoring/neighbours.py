"""The training rows that are most like a request, by what was measured of it: what can be said of one whose text is
not kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from monitoring import statistics
from registry import datasets
from registry.datasets import Row
from registry.profile import FEATURES, Answer, Extractor, Profile

if TYPE_CHECKING:
    from monitoring.statistics import Array

_ROWS = 2_000  # of a data set, about, evenly from all of it
_SILENT = Answer(text="", completion_tokens=0, finish_reason="stop")
# What a tokenizer or a vocabulary is needed for is not compared
_COMPARED = tuple(
    (place, feature)
    for place, feature in enumerate(FEATURES)
    if feature.side == "input" and feature.name not in ("prompt_tokens", "chars_per_token", "unseen_word_share")
)
_OTHER_TOPIC = 0.2  # how far topics lie apart, where the whole range of another feature is 1


def nearest(dataset: str, features: Sequence[float], profile: Profile) -> Row | None:
    """The row of a data set that is nearest to an event's `features`, which were measured with `profile`, by the mean
    distance in bins; None when nothing is known of it. Raises NotFound when the data set is not kept here."""
    import numpy

    rows, known = _known(dataset, tuple((word, tuple(place)) for word, place in profile.places.items()))
    wanted = statistics.array(_places(features))
    if not rows or numpy.isnan(wanted).all():
        return None
    apart = abs(known - wanted)
    for column, (_, feature) in enumerate(_COMPARED):
        if feature.kind == "category":
            apart[:, column] = numpy.where(apart[:, column] > 0, _OTHER_TOPIC, apart[:, column])
    return rows[int(numpy.nanmean(apart, axis=-1).argmin())]


@lru_cache(maxsize=4)
def _known(dataset: str, places: tuple[tuple[str, tuple[float, ...]], ...]) -> tuple[list[Row], Array]:
    kept = datasets.open_dataset(dataset)
    every = max(1, int(kept.counts.get("train", 0)) // _ROWS)
    rows = [row for row in kept.rows("train", every) if row.source != "canary"]
    extractor = Extractor(Profile(histograms={}, places=dict(places)))
    return rows, statistics.array([_places(extractor.features(row.prompt, _SILENT, 0)) for row in rows])


def _places(features: Sequence[float]) -> list[float]:
    """Where each value lies within its feature's range, 0 to 1; NaN where it is not known, as of older events."""

    def known(place: int) -> bool:
        return place < len(features) and features[place] == features[place]

    return [feature.bin(features[p]) / feature.bins if known(p) else math.nan for p, feature in _COMPARED]
