"""What an iteration keeps where the rows are for the next: it saves time, and nothing is lost with it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_CLUSTERINGS = 16

_KEPT: OrderedDict[str, dict[tuple[int, int], Any]] = OrderedDict()


def get(clustering: str, samples: NDArray[np.int64]) -> Any:
    """What was kept of these rows, None if that is not known here."""
    return _KEPT.get(clustering, {}).get(_key(samples)) if len(samples) else None


def put(clustering: str, samples: NDArray[np.int64], value: Any) -> None:
    """Remember something of these rows; the oldest of many clusterings is forgotten."""
    if not len(samples):
        return
    _KEPT.setdefault(clustering, {})[_key(samples)] = value
    while len(_KEPT) > _MOST_CLUSTERINGS:
        _KEPT.popitem(last=False)


def forget(clustering: str) -> None:
    """Free the memory of one clustering."""
    _KEPT.pop(clustering, None)


def _key(samples: NDArray[np.int64]) -> tuple[int, int]:
    return int(samples[0]), len(samples)
