"""Incremental assignment: once most centroids are unchanged, their rows are compared with the few that moved.

A row's nearest centroid, if unchanged, is still the nearest of all unchanged ones. So the candidates are that one and
those that moved: exact, with no state per row but its label.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search.assign import Engine, assign
from raycluster.clustering.search.centroids import PreparedCentroids
from raycluster.clustering.search.rerank import nearest_in_float64

_SPARED = 1024  # unchanged centroids from which on skipping them pays
_ROWS = 256


def few(moved: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """Which centroids moved, (m,), if few enough for `assign_again` to pay; else None. moved: (K,) bool."""
    count = int(np.count_nonzero(moved))
    pays = not count or (4 * count <= len(moved) and len(moved) - count >= _SPARED)
    return np.flatnonzero(moved) if pays else None


def assign_again(
    values: NDArray[np.floating], prepared: PreparedCentroids, engine: Engine, previous: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Labels (n,) of `assign`; previous: (n,) labels before the centroids in prepared.moved moved."""
    assert prepared.moved is not None
    stayed = np.ones(len(prepared.centroids), np.bool_)
    stayed[prepared.moved] = False
    unmoved, labels = stayed[previous], previous.copy()
    labels[~unmoved] = assign(values[~unmoved], prepared, engine, previous[~unmoved])
    if len(prepared.moved):
        rows, own = values[unmoved], previous[unmoved]
        rivals = prepared.moved[assign(rows, prepared.moved_centroids, engine)]
        chunks = [slice(start, start + _ROWS) for start in range(0, len(rows), _ROWS)]
        nearer = [_nearer(rows[part], np.stack([own[part], rivals[part]], axis=1), prepared) for part in chunks]
        labels[unmoved] = np.concatenate([own[:0], *nearer])
    return labels


def _nearer(values: NDArray[np.floating], pairs: NDArray[np.int64], prepared: PreparedCentroids) -> NDArray[np.int64]:
    """The nearer of each row's two centroids, (n, 2): by float32 scores as in `float_search`, near-ties in float64."""
    rows = torch.from_numpy(values.astype(np.float32, copy=False) - prepared.centre)
    centroids, columns = torch.from_numpy(prepared.centroids), torch.from_numpy(pairs)
    centred = centroids[columns].sub_(torch.from_numpy(prepared.centre))
    scores = centred.mul_(rows[:, None]).sum(dim=2).add_(prepared.offsets[columns])
    error_bound = prepared.score_error(torch.linalg.vector_norm(rows, dim=1))
    lead = scores[:, 1] - scores[:, 0]
    labels = np.where((lead > 0).numpy(), pairs[:, 1], pairs[:, 0])
    doubtful = ~(lead.abs() > error_bound).numpy()  # negated, so that NaN counts as too close
    if doubtful.any():
        row_ids = np.repeat(np.arange(np.count_nonzero(doubtful)), 2)
        labels[doubtful] = nearest_in_float64(values[doubtful], row_ids, pairs[doubtful].ravel(), prepared.centroids)
    return labels
