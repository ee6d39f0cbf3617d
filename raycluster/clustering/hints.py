"""Labels of the iteration before, kept where the rows are: they save time, and nothing is lost with them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

_MOST_CLUSTERINGS = 16

_LABELS: OrderedDict[str, dict[tuple[int, int], NDArray[np.int32]]] = OrderedDict()


def recall(clustering: str, samples: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """What these rows were labelled last time, if that is known here."""
    if not len(samples):
        return None
    found = _LABELS.get(clustering, {}).get(_key(samples))
    return None if found is None else found.astype(np.int64)


def keep(clustering: str, samples: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Remember the labels of these rows; the oldest of many clusterings is forgotten."""
    if not len(samples):
        return
    _LABELS.setdefault(clustering, {})[_key(samples)] = labels.astype(np.int32)
    while len(_LABELS) > _MOST_CLUSTERINGS:
        _LABELS.popitem(last=False)


def forget(clustering: str) -> None:
    """Free the memory of one clustering."""
    _LABELS.pop(clustering, None)


def _key(samples: NDArray[np.int64]) -> tuple[int, int]:
    return int(samples[0]), len(samples)
