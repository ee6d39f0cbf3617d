"""Sums over the rows of clusters as whole numbers, the same to the bit in any order (fixed point, 64 bits)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering import kernel
from raycluster.features import Extent, Features
from raycluster.types import Block

# 40 bits per value, 62 per total; a value times its scale stays below 2^51, where float64 can round it by addition.
_VALUE_BITS = 40
_TOTAL_BITS = 62
_LARGEST_BITS = 50
_ROWS = 512
_CLUSTERS = 1024


class ClusterSums(NamedTuple):
    """counts: (K,) int64 rows. totals: (K, D) int64 sums of round(x * scale). changed: rows not labelled as before, of
    the compared ones, whose labels before are known where they were summed.
    """

    counts: NDArray[np.int64]
    totals: NDArray[np.int64]
    changed: int
    compared: int


class Labelled(NamedTuple):
    """Rows that are still to be summed: values (n, D), their labels (n,), and what the sums are to be like."""

    values: NDArray[np.floating]
    labels: NDArray[np.int64]
    num_clusters: int
    scale: float
    changed: int
    compared: int
    compiled: bool


Sums: TypeAlias = ClusterSums | Labelled


def merge(left: Sums, right: Sums) -> Sums:
    """Add two of them, writing over one where that is allowed; no more than one K x D array is made."""
    if isinstance(left, Labelled) or (isinstance(right, ClusterSums) and not left.totals.flags.writeable):
        left, right = right, left
    sums = _writeable(left)
    if isinstance(right, Labelled):
        return _absorb(sums, right)
    np.add(sums.counts, right.counts, out=sums.counts)
    np.add(sums.totals, right.totals, out=sums.totals)
    return sums._replace(changed=sums.changed + right.changed, compared=sums.compared + right.compared)


def total(sums: Sums) -> ClusterSums:
    """The sums of what a fold gave: a single piece may come back as it was."""
    return _writeable(sums) if isinstance(sums, Labelled) else sums


def _writeable(sums: Sums) -> ClusterSums:
    if isinstance(sums, Labelled):
        shape = sums.num_clusters, sums.values.shape[1]
        return _absorb(ClusterSums(np.zeros(shape[0], np.int64), np.zeros(shape, np.int64), 0, 0), sums)
    if sums.totals.flags.writeable and sums.counts.flags.writeable:
        return sums
    return sums._replace(counts=sums.counts.copy(), totals=sums.totals.copy())


def _absorb(sums: ClusterSums, rows: Labelled) -> ClusterSums:
    for start in range(0, len(rows.values), _ROWS):
        values, labels = rows.values[start : start + _ROWS], rows.labels[start : start + _ROWS]
        if rows.compiled:
            kernel.add_rows(values.astype(np.float32, copy=False), labels, rows.scale, sums.totals, sums.counts)
            continue
        fixed = values.astype(np.float64)
        fixed *= rows.scale
        whole = torch.from_numpy(np.rint(fixed, out=fixed)).to(torch.int64)
        torch.from_numpy(sums.totals).index_add_(0, torch.from_numpy(labels), whole)
        sums.counts[:] += np.bincount(labels, minlength=rows.num_clusters)
    return sums._replace(changed=sums.changed + rows.changed, compared=sums.compared + rows.compared)


def sum_scale(size: Extent) -> float:
    """The power of two that turns values into integers whose sum over all rows cannot overflow."""
    _, exponent = np.frexp(max(abs(float(size.low.min())), abs(float(size.high.max()))))
    return 2.0 ** (min(_VALUE_BITS, _TOTAL_BITS - size.num_rows.bit_length()) - int(exponent))


def means(
    sums: ClusterSums, scale: float, clusters: NDArray[np.integer] | slice, otherwise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(k, D) means of some clusters; rows of `otherwise` where they have none."""
    counts, totals, result = sums.counts[clusters], sums.totals[clusters], otherwise.copy()
    used = counts > 0
    result[used] = totals[used] / counts[used, None] / scale
    return result


def spans(num_clusters: int) -> Iterator[slice]:
    """Clusters that are dealt with together: temporary arrays stay small, however many there are."""
    for start in range(0, num_clusters, _CLUSTERS):
        yield slice(start, start + _CLUSTERS)


def sum_of_squares(features: Features, size: Extent) -> float:
    """Sum of |x|^2 over all rows."""
    most = np.maximum(np.abs(size.low), np.abs(size.high)).astype(np.float64)
    scale = _square_scale(most, size.num_rows)
    (squares,) = features.fold(_squares, scale)
    return float(squares / scale)


def _square_scale(most: NDArray[np.float64], num_rows: int) -> float:
    """Makes integers of squares of values up to most (D,), such that neither one nor all of them are too large."""
    _, exponent = np.frexp(np.square(most).sum())
    return 2.0 ** (min(_LARGEST_BITS, _TOTAL_BITS - num_rows.bit_length()) - int(exponent))


def _squares(block: Block, scale: float) -> tuple[int]:
    whole = 0
    for start in range(0, len(block.values), _ROWS):
        squares = np.square(block.values[start : start + _ROWS], dtype=np.float64).sum(axis=1)
        whole += int(np.rint(squares * scale).astype(np.int64).sum())
    return (whole,)


def inertia_of(sums: ClusterSums, centroids: NDArray[np.float32], scale: float, squares: float) -> float:
    """Sum of squared distances to the centroids that made the sums: |x|^2 - 2 c.x + |c|^2, summed by cluster."""
    result = squares
    for part in spans(len(centroids)):
        used = centroids[part].astype(np.float64)
        lengths = np.square(used).sum(axis=1) * sums.counts[part]
        result += float(lengths.sum() - 2 * (used * (sums.totals[part] / scale)).sum())
    return max(0.0, result)


def spread_scale(size: Extent, centroids: NDArray[np.float32]) -> float:
    """The power of two for `spread`: no sum over all rows can overflow."""
    high = np.maximum(size.high, centroids.max(axis=0)).astype(np.float64)
    return _square_scale(high - np.minimum(size.low, centroids.min(axis=0)), size.num_rows)


def spread(
    values: NDArray[np.floating],
    labels: NDArray[np.int64],
    scale: float,
    centroids: NDArray[np.float32],
    compiled: bool,
) -> int:
    """Sum of round((x - c)^2 * scale) over all values; zero if every row lies on its centroid."""
    whole = 0
    for start in range(0, len(values), _ROWS):
        rows, chosen = values[start : start + _ROWS].astype(np.float32, copy=False), labels[start : start + _ROWS]
        if compiled:
            whole += kernel.spread(rows, chosen, scale, centroids)
        else:
            apart = rows.astype(np.float64) - centroids[chosen]
            whole += int(np.rint(np.square(apart, out=apart) * scale).astype(np.int64).sum())
    return whole
