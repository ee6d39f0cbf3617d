"""Does a source list its images class by class, and how many shards must then be shuffled together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raycluster.seeding import generator
from raycluster.types import Shard

MAX_WINDOW_SHARDS = 64  # each window reads from so many files at a time
_GROUP_ROWS = 256  # of a batch-norm group, at most
_FAIR_SHARE = 0.9
_ORDERED_SHARE = 0.7
_SHARDS_EXAMINED = 512
_TRIALS = 8


def window_shards(labels: NDArray[np.integer], shards: Sequence[Shard]) -> int:
    """The number of shards to shuffle together so that a batch-norm group sees a fair mix of classes.

    labels: (N,), negative where unknown. -> 1 if the shards are mixed already. Else the smallest power of two with
    which 256 rows of a window of random shards hold at least 90% of the classes that 256 random rows of the data set
    hold; at most 64, and at most all shards.
    """
    if len(shards) < 2 or not is_ordered(labels, shards):
        return 1
    largest = min(MAX_WINDOW_SHARDS, len(shards))
    fair = _FAIR_SHARE * _expected_classes(_frequencies(labels), _GROUP_ROWS)
    width = 2
    while width < largest and _classes_in_group(labels, shards, width) < fair:
        width *= 2
    return min(width, largest)


def is_ordered(labels: NDArray[np.integer], shards: Sequence[Shard]) -> bool:
    """Whether the shards hold far fewer distinct classes than those of a random order would.

    Fewer than 70% of the expected number, and fewer by 4 standard deviations; the sums run over up to 512 evenly spaced
    shards.
    """
    frequencies = _frequencies(labels)
    if len(frequencies) < 2:
        return False
    seen = expected = variance = 0.0
    for start, stop in (shards[shard] for shard in spread(len(shards), _SHARDS_EXAMINED)):
        counts = _frequencies(labels[start:stop], normalise=False)
        present = 1 - (1 - frequencies) ** counts.sum()
        seen += len(counts)
        expected += present.sum()
        variance += (present * (1 - present)).sum()
    return bool(seen < _ORDERED_SHARE * expected and seen < expected - 4 * np.sqrt(variance))


def spread(total: int, count: int) -> list[int]:
    """Up to `count` evenly spaced numbers below `total`, ascending."""
    count = min(count, total)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _classes_in_group(labels: NDArray[np.integer], shards: Sequence[Shard], width: int) -> float:
    """Expected distinct classes in a batch-norm group of a window of `width` random shards."""
    rng = generator(0, "class order", width)
    found = []
    for _ in range(_TRIALS):
        window = rng.choice(len(shards), width, replace=False)
        rows = np.concatenate([labels[slice(*shards[shard])] for shard in window])
        found.append(_expected_classes(_frequencies(rows), _GROUP_ROWS))
    return float(np.mean(found))


def _expected_classes(frequencies: NDArray[np.float64], rows: int) -> float:
    return float((1 - (1 - frequencies) ** rows).sum())


def _frequencies(labels: NDArray[np.integer], *, normalise: bool = True) -> NDArray[np.float64]:
    """Share, or number, of images of each class that occurs."""
    counts = np.unique(labels[labels >= 0], return_counts=True)[1].astype(np.float64)
    return counts / max(1.0, counts.sum()) if normalise else counts
