"""Exact ranking of candidates by float64 distances, computed pair by pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PAIR_ENTRIES = 1 << 17
_SUMS = 32  # SUMS_PER_ROW of kernel.c


def nearest_in_float64(
    values: NDArray[np.floating], rows: NDArray[np.intp], columns: NDArray[np.intp], centroids: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The nearest candidate of every row that has any, of equal distances the lowest.

    rows, columns: candidates, pair by pair; rows ascending.
    """
    distances = pair_distances(values, rows, centroids, columns)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    least = np.repeat(np.minimum.reduceat(distances, starts), np.diff(starts, append=len(rows)))
    lowest: NDArray[np.int64] = np.minimum.reduceat(np.where(distances == least, columns, len(centroids)), starts)
    return lowest


def squared_distances(
    values: NDArray[np.floating], centroids: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Squared distance (n,) of each row to the centroid its label names, in float64."""
    return pair_distances(values, np.arange(len(values)), centroids, labels)


def pair_distances(
    values: NDArray[np.floating],
    rows: NDArray[np.integer],
    centroids: NDArray[np.floating],
    columns: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Squared distance of the row and the centroid of each pair, in float64, independent of the other pairs."""
    result = np.empty(len(rows), np.float64)
    size = max(1, _PAIR_ENTRIES // values.shape[1])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        difference = values[rows[part]].astype(np.float64) - centroids[columns[part]]
        result[part] = _row_sums(np.square(difference, out=difference))
    return result


def _row_sums(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) sums of the rows of (n, D), in the order in which the compiled kernel adds."""
    width = min(_SUMS, 1 << (terms.shape[1] - 1).bit_length())
    sums = np.zeros((len(terms), width))
    for start in range(0, terms.shape[1], width):
        part = terms[:, start : start + width]
        sums[:, : part.shape[1]] += part
    while (width := width // 2) > 0:
        sums = sums[:, :width] + sums[:, width:]
    return sums[:, 0]
