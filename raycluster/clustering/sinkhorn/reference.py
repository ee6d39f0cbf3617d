"""The passes of `sinkhorn.c` in numpy and torch, for machines without a compiler."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.sinkhorn.sparse import Candidates, CandidateWindow, Classifier, Plan

_ROWS = 256
_PAIRS = 1 << 14


def candidates(rows: NDArray[np.float32], head: Classifier, window: CandidateWindow) -> Candidates:
    """See `native.candidates`."""
    parts = [_some(rows[start : start + _ROWS], head, window) for start in range(0, max(len(rows), 1), _ROWS)]
    counts, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Candidates(np.concatenate([[0], np.cumsum(counts)]), *columns)


def _some(rows: NDArray[np.float32], head: Classifier, window: CandidateWindow) -> tuple[NDArray[np.generic], ...]:
    """(counts, cluster, score, top, norm) of a few rows.

    The order in which a product adds depends on how many rows it is given. So it only proposes candidates, within a
    bound on its rounding errors (see `search.bounds`), and their scores are computed again, pair by pair.
    """
    weight = head.weight()
    exact, approximate = rows.astype(np.float64), rows.astype(np.float64)
    error_bound = np.zeros((len(rows), 1))
    if weight is not None:
        wide = weight.astype(np.float64)
        approximate = (torch.from_numpy(exact) @ torch.from_numpy(wide).T).numpy() + head.bias
        max_weight = np.abs(wide).max(axis=0, initial=0.0)
        error_bound = (
            (rows.shape[1] + 8)
            * 2.0**-52
            * ((np.abs(exact) * max_weight).sum(axis=1) + np.abs(head.bias).max())[:, None]
        )
    largest = approximate.max(axis=1, keepdims=True)
    norm = (largest + np.log(np.exp(approximate - largest).sum(axis=1, keepdims=True)))[:, 0]
    norm = norm.astype(np.float32).astype(np.float64)  # drops bits that depend on the order
    approximate = window.sharpness * approximate + window.scaling
    floor = approximate.max(axis=1, keepdims=True) - window.depth - 4 * window.sharpness * error_bound
    row, cluster = np.nonzero((approximate >= floor) & (approximate > -np.inf))
    score = exact[row, cluster] if weight is None else _pairs(exact, wide, row, cluster) + head.bias[cluster]
    score = window.sharpness * score + window.scaling[cluster]
    top = np.full(len(rows), -np.inf)
    np.maximum.at(top, row, score)
    kept = score >= top[row] - window.depth
    row, cluster = row[kept], cluster[kept]
    return np.bincount(row, minlength=len(rows)), cluster.astype(np.int32), score[kept] - top[row], top, norm


def _pairs(
    rows: NDArray[np.float64], weight: NDArray[np.float64], row: NDArray[np.intp], cluster: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Inner products pair by pair, each in a fixed order."""
    parts = [
        (rows[row[start : start + _PAIRS]] * weight[cluster[start : start + _PAIRS]]).sum(axis=1)
        for start in range(0, max(len(row), 1), _PAIRS)
    ]
    return np.concatenate(parts)


def plan(found: Candidates, shift: NDArray[np.float64], negligible: float, value_scale: float) -> Plan:
    """See `native.plan`."""
    row = np.repeat(np.arange(len(found.top)), np.diff(found.first))
    score = found.score + shift[found.cluster]
    largest = _by_row(np.maximum, score, found.first)
    kept = score >= largest[row] - negligible
    row, cluster, score = row[kept], found.cluster[kept], score[kept]
    first = np.searchsorted(row, np.arange(len(found.first)))
    weight = np.exp(score - largest[row])
    sums = _by_row(np.add, weight, first)
    values = np.rint((largest + np.log(sums)) * value_scale).astype(np.int64)
    return Plan(first, cluster, weight / sums[row], int(values.sum()))


def marginals(found: Plan, num_clusters: int, scale: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """See `native.marginals`."""
    slopes = found.share * (1 - found.share)
    return _sum(found.cluster, found.share * scale, num_clusters), _sum(found.cluster, slopes * scale, num_clusters)


def product(found: Plan, vector: NDArray[np.float64], scale: float) -> NDArray[np.int64]:
    """See `native.product`."""
    along = vector[found.cluster]
    mean = np.repeat(_by_row(np.add, found.share * along, found.first), np.diff(found.first))
    return _sum(found.cluster, found.share * (along - mean) * scale, len(vector))


def _by_row(reduce: np.ufunc, values: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = reduce.reduceat(values, first[:-1]) if len(values) else np.empty(0)
    return result


def _sum(cluster: NDArray[np.int32], values: NDArray[np.float64], num_clusters: int) -> NDArray[np.int64]:
    sums = torch.zeros(num_clusters, dtype=torch.int64)
    whole = torch.from_numpy(np.rint(values).astype(np.int64))
    return sums.index_add_(0, torch.from_numpy(cluster.astype(np.int64)), whole).numpy()
