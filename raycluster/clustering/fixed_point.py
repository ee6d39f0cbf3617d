"""Sums over the rows of clusters as 64-bit integers (fixed point): bitwise identical in any order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cpu
from raycluster.features.matrix import FeatureStats, add
from raycluster.types import Features

# 40 bits per value, 62 per total; a value times its scale stays below 2^51, where float64 can round it by addition.
_VALUE_BITS = 40
_TOTAL_BITS = 62
_LARGEST_BITS = 50
_ROWS = 512
_FEW_ROWS = 128  # as float64 they fit the L2 cache
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = 0x4338000000000000
_CLUSTERS = 64


class ClusterSums(NamedTuple):
    """totals: (k, D) int64 sums of round(x * scale) over the rows of k clusters. others: further sums."""

    totals: NDArray[np.int64]
    others: tuple[Any, ...]


class PendingRows(NamedTuple):
    """Rows not summed yet: values (n, D), labels (n,) below num_clusters; others as in `ClusterSums`."""

    values: NDArray[np.floating]
    labels: NDArray[np.int64]
    num_clusters: int
    scale: float
    compiled: bool
    others: tuple[Any, ...]


Sums: TypeAlias = ClusterSums | PendingRows


def select(
    values: NDArray[np.floating], labels: NDArray[np.int64], span: slice
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """The rows whose labels lie in a span of clusters, and their labels counted from its start."""
    inside = (labels >= span.start) & (labels < span.stop)
    if not inside.all():
        values, labels = values[inside], labels[inside]
    return values, labels - span.start


def merge(left: Sums, right: Sums) -> Sums:
    """Add two, in place where one is writeable; allocates at most one array of totals."""
    if isinstance(left, PendingRows) or (isinstance(right, ClusterSums) and not left.totals.flags.writeable):
        left, right = right, left
    sums = _as_writeable(left)
    if isinstance(right, PendingRows):
        _add_pending(sums.totals, right)
    else:
        np.add(sums.totals, right.totals, out=sums.totals)
    return sums._replace(others=add(sums.others, right.others))


def total(sums: Sums) -> ClusterSums:
    """The sums of a fold, which returns a single piece unchanged."""
    return _as_writeable(sums) if isinstance(sums, PendingRows) else sums


def _as_writeable(sums: Sums) -> ClusterSums:
    if isinstance(sums, PendingRows):
        totals = np.zeros((sums.num_clusters, sums.values.shape[1]), np.int64)
        _add_pending(totals, sums)
        return ClusterSums(totals, sums.others)
    return sums if sums.totals.flags.writeable else sums._replace(totals=sums.totals.copy())


def _add_pending(totals: NDArray[np.int64], rows: PendingRows) -> None:
    for part in _row_chunks(len(rows.values), rows.compiled):
        values, labels = rows.values[part], rows.labels[part]
        if rows.compiled:
            int8_cpu.add_rows(values.astype(np.float32, copy=False), labels, rows.scale, totals)
        else:
            integers = _rounded(torch.from_numpy(values.astype(np.float64)), rows.scale)
            torch.from_numpy(totals).index_add_(0, torch.from_numpy(labels), integers)


def _rounded(values: torch.Tensor, scale: float) -> torch.Tensor:
    """round(values * scale), each below 2^51, in place of the float64 values: the low bits of value + 1.5 2^52."""
    return values.mul_(scale).add_(_MAGIC).view(torch.int64).sub_(_MAGIC_BITS)


def _row_chunks(count: int, compiled: bool) -> Iterator[slice]:
    size = _ROWS if compiled else _FEW_ROWS
    return (slice(start, start + size) for start in range(0, count, size))


def sum_scale(stats: FeatureStats) -> float:
    """The power of two that turns values into integers whose sum over all rows cannot overflow."""
    _, exponent = np.frexp(max(abs(float(stats.low.min())), abs(float(stats.high.max()))))
    return 2.0 ** (min(_VALUE_BITS, _TOTAL_BITS - stats.num_rows.bit_length()) - int(exponent))


def means(
    totals: NDArray[np.int64], counts: NDArray[np.int64], scale: float, fallback: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(k, D) means of some clusters; rows of `fallback` for empty ones."""
    used, result = counts > 0, fallback.copy()
    result[used] = totals[used] / counts[used, None] / scale
    return result


def spans(num_clusters: int, features: Features) -> list[slice]:
    """Ranges of clusters whose totals fit the memory budget at a time."""
    size = max(1, features.memory_budget // (8 * features.dim))
    return [slice(start, min(start + size, num_clusters)) for start in range(0, num_clusters, size)]


def parts(span: slice) -> Iterator[tuple[slice, slice]]:
    """Few clusters at a time, to keep temporary arrays small: their range among all, and within the span."""
    for start in range(span.start, span.stop, _CLUSTERS):
        stop = min(start + _CLUSTERS, span.stop)
        yield slice(start, stop), slice(start - span.start, stop - span.start)


def _square_scale(max_abs: NDArray[np.float64], num_rows: int) -> float:
    """Scale to integers of squares of values up to max_abs (D,), such that neither one nor their sum overflows."""
    _, exponent = np.frexp(np.square(max_abs).sum())
    return 2.0 ** (min(_LARGEST_BITS, _TOTAL_BITS - num_rows.bit_length()) - int(exponent))


def inertia_scale(stats: FeatureStats, centroids: NDArray[np.float32]) -> float:
    """The power of two for `inertia_sum`: no sum over all rows can overflow."""
    high = np.maximum(stats.high, centroids.max(axis=0)).astype(np.float64)
    return _square_scale(high - np.minimum(stats.low, centroids.min(axis=0)), stats.num_rows)


def inertia_sum(
    values: NDArray[np.floating],
    labels: NDArray[np.int64],
    scale: float,
    centroids: NDArray[np.float32],
    compiled: bool,
) -> int:
    """Sum of round((x - c)^2 * scale) over all values; zero if every row lies on its centroid."""
    integers = 0
    for part in _row_chunks(len(values), compiled):
        rows, row_labels = values[part], labels[part]
        if compiled:
            integers += int8_cpu.inertia_sum(rows.astype(np.float32, copy=False), row_labels, scale, centroids)
        else:
            distance = torch.from_numpy(rows.astype(np.float64)).sub_(torch.from_numpy(centroids[row_labels]))
            integers += int(_rounded(distance.square_(), scale).sum())
    return integers
