"""Merging of clusters in rounds on the sparse graph of those within a threshold, for reducible linkages.

In a round every two clusters that are nearest to each other merge. That gives the hierarchy of merging the nearest two
of all one by one, because a merged cluster is never nearer to a third than its nearer half was (Murtagh 1983). For the
same reason clusters further apart than the threshold need not be known: a pair within it comes from one within it. Of
equal distances those between the lowest rows come first.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import scipy.sparse.csgraph
from numpy.typing import NDArray

from raycluster.clustering.search.close_pairs import Pairs, concatenate
from raycluster.clustering.search.rerank import pair_distances

_PAIRS = 1 << 20


class Joined(NamedTuple):
    """Pairs of clusters after a round, at least one of which is new, and the old pairs that each consists of.

    low < high: (g,) clusters. complete: (g,) bool, whether all old pairs were within the threshold. starts: (g,) where
    its old pairs start among `old`. kept, gone: (m,) clusters that were merged, the second into the first.
    """

    low: NDArray[np.int32]
    high: NDArray[np.int32]
    complete: NDArray[np.bool_]
    starts: NDArray[np.intp]
    old: Pairs
    kept: NDArray[np.int32]
    gone: NDArray[np.int32]


class Linkage(Protocol):
    """The distance of two clusters; told of every round in turn."""

    def distances(self, joined: Joined) -> NDArray[np.float64]:
        """(g,) those of the new pairs; infinite for some beyond the threshold."""
        ...


class Complete:
    """The largest distance of their rows."""

    def distances(self, joined: Joined) -> NDArray[np.float64]:
        if not len(joined.starts):
            return np.empty(0)
        return np.where(joined.complete, np.maximum.reduceat(joined.old.distances, joined.starts), np.inf)


class Average:
    """The mean distance of their rows; computed from the rows where it does not follow from the old pairs."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._values, self._clusters = values, np.arange(len(values))
        self._sizes = np.ones(len(values), np.int64)

    def distances(self, joined: Joined) -> NDArray[np.float64]:
        old = joined.old
        weighted = old.distances * (self._sizes[old.low] * self._sizes[old.high])
        self._sizes[joined.kept] += self._sizes[joined.gone]
        self._sizes[joined.gone] = 0
        moved = np.arange(len(self._sizes))
        moved[joined.gone] = joined.kept
        self._clusters = moved[self._clusters]
        if not len(joined.starts):
            return np.empty(0)
        sums = np.add.reduceat(weighted, joined.starts)
        rest = np.flatnonzero(~joined.complete)
        sums[rest] = self._sums(joined.low[rest], joined.high[rest])
        return sums / (self._sizes[joined.low] * self._sizes[joined.high])

    def _sums(self, low: NDArray[np.int32], high: NDArray[np.int32]) -> NDArray[np.float64]:
        """(g,) sums of the distances between the rows of pairs of clusters."""
        members = np.argsort(self._clusters, kind="stable")
        first = np.cumsum(self._sizes) - self._sizes
        stops = np.cumsum(self._sizes[low] * self._sizes[high])
        sums = np.zeros(len(low))
        for start in range(0, int(stops[-1]) if len(stops) else 0, _PAIRS):
            numbers = np.arange(start, min(start + _PAIRS, stops[-1]))
            pair = np.searchsorted(stops, numbers, side="right")
            numbers -= np.append(0, stops)[pair]
            rows, columns = np.divmod(numbers, self._sizes[high[pair]])
            left, right = members[first[low[pair]] + rows], members[first[high[pair]] + columns]
            squares = pair_distances(self._values, left, self._values, right)
            sums += np.bincount(pair, np.sqrt(squares), len(sums))
        return sums


class Ward:
    """sqrt(2 a b / (a + b)) times the distance of the means, for clusters of a and b rows (as in scipy)."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._means, self._sizes = values.astype(np.float64), np.ones(len(values), np.int64)

    def distances(self, joined: Joined) -> NDArray[np.float64]:
        kept, gone, sizes = joined.kept, joined.gone, self._sizes
        totals = sizes[kept] + sizes[gone]
        for left, right, total in zip(kept, gone, totals, strict=True):
            self._means[left] = (sizes[left] * self._means[left] + sizes[right] * self._means[right]) / total
        sizes[kept] = totals
        low, high = joined.low, joined.high
        weights = 2 * sizes[low] * sizes[high] / (sizes[low] + sizes[high])
        return np.sqrt(weights * pair_distances(self._means, low, self._means, high))


def merge(pairs: Pairs, num_rows: int, threshold: float, linkage: Linkage) -> NDArray[np.int64]:
    """(N,) the lowest row of the cluster of every row, once all clusters are further apart than the threshold.

    pairs: all rows within the threshold, each once, ordered by low and high.
    """
    parents = np.arange(num_rows)
    while len(pairs.low):
        kept, gone = _nearest_to_each_other(pairs, num_rows)
        parents[gone] = kept
        untouched, joined = _join(pairs, kept, gone, num_rows)
        distances = linkage.distances(joined)
        new = Pairs(joined.low, joined.high, distances).chosen(distances <= threshold)
        pairs = concatenate([untouched, new])
    while not np.array_equal(further := parents[parents], parents):
        parents = further
    return parents


def join_components(roots: NDArray[np.int64], pairs: Pairs) -> NDArray[np.int64]:
    """(N,) the lowest row of the component of every row, with these pairs joined to the components before: `roots`."""
    size = len(roots)
    edges = scipy.sparse.coo_array((np.ones(len(pairs.low), bool), (roots[pairs.low], roots[pairs.high])), (size, size))
    _, components = scipy.sparse.csgraph.connected_components(edges, directed=False)
    _, lowest = np.unique(components, return_index=True)
    return lowest[components][roots]


def _nearest_to_each_other(pairs: Pairs, num_rows: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pairs of which each cluster is the nearest of the other; of equal distances the lowest pair."""
    low, high, distances = pairs
    nearest = np.full(num_rows, np.inf)
    np.minimum.at(nearest, low, distances)
    np.minimum.at(nearest, high, distances)
    ties = np.flatnonzero((distances == nearest[low]) | (distances == nearest[high]))
    low, high, distances = low[ties], high[ties], distances[ties]
    codes = _codes(low, high)
    first = np.full(num_rows, np.iinfo(np.int64).max)
    for ends in (low, high):
        at = np.flatnonzero(distances == nearest[ends])
        np.minimum.at(first, ends[at], codes[at])
    mutual = np.flatnonzero((first[low] == codes) & (first[high] == codes))
    return low[mutual], high[mutual]


def _join(pairs: Pairs, kept: NDArray[np.int32], gone: NDArray[np.int32], num_rows: int) -> tuple[Pairs, Joined]:
    """The pairs of clusters that did not change, and those that did."""
    parts, moved = np.ones(num_rows, np.int8), np.arange(num_rows, dtype=np.int32)
    parts[kept], moved[gone] = 2, kept
    changed = parts > 1
    changed[gone] = True
    touched = changed[pairs.low] | changed[pairs.high]
    old = pairs.chosen(touched)
    left, right = moved[old.low], moved[old.high]
    codes = _codes(np.minimum(left, right), np.maximum(left, right))
    order = np.argsort(codes, kind="stable")
    order = order[(left != right)[order]]
    codes = codes[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    low, high = (codes[starts] >> 32).astype(np.int32), codes[starts].astype(np.int32)
    complete = np.diff(starts, append=len(codes)) == parts[low] * parts[high]
    return pairs.chosen(~touched), Joined(low, high, complete, starts, old.chosen(order), kept, gone)


def _codes(low: NDArray[np.int32], high: NDArray[np.int32]) -> NDArray[np.int64]:
    """Numbers in the order of the pairs (low, high)."""
    return low.astype(np.int64) << 32 | high
