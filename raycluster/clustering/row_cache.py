"""A best-effort cache of results per block of rows, in the process that holds the rows; eviction only costs time."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_CLUSTERINGS = 16

_CACHE: OrderedDict[str, dict[tuple[int, int], Any]] = OrderedDict()


def get(clustering: str, samples: NDArray[np.int64]) -> Any:
    """The value cached for these rows, or None."""
    return _CACHE.get(clustering, {}).get(_key(samples)) if len(samples) else None


def put(clustering: str, samples: NDArray[np.int64], value: Any) -> None:
    """Cache a value for these rows; the oldest of more than 16 clusterings is evicted."""
    if not len(samples):
        return
    _CACHE.setdefault(clustering, {})[_key(samples)] = value
    while len(_CACHE) > _MAX_CLUSTERINGS:
        _CACHE.popitem(last=False)


def clear(clustering: str) -> None:
    """Evict all values of one clustering."""
    _CACHE.pop(clustering, None)


def _key(samples: NDArray[np.int64]) -> tuple[int, int]:
    return int(samples[0]), len(samples)
