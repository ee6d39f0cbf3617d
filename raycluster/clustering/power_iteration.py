"""Power iteration clustering on the graph of nearest neighbours: the number of clusters is found, not given.

The variant of DeepCluster's published code (Caron et al., ECCV 2018, appendix; Cho and Lee, Mode-seeking on graphs via
random walks, CVPR 2012). Neighbours are searched where the rows are. The graph itself is held in one place: with 5
neighbours at most 600 bytes per row (800 with the approximate search), whatever their width; 10^8 rows fit a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from raycluster.clustering.approximate_knn import Search, find_neighbours
from raycluster.clustering.knn_graph import sorted_samples
from raycluster.types import Features, UserError

Singletons = Literal["redistribute", "keep", "discard"]
Weights = Any
"""A (N, N) symmetric scipy.sparse.csr_array of affinities >= 0, indices ascending in each row, zero diagonal."""

_ROWS = 1 << 20


@dataclass(frozen=True, eq=False)
class PowerIterationClustering:
    """A clustering that found its number of clusters. Row i belongs to samples[i] (ascending).

    samples, labels: (N,) int64; clusters are numbered by the sample ids of their roots, -1 is a discarded row. roots:
    (num_clusters,) int64, the sample id of the mode of each cluster. scores: (N,) float64, the stationary vector, which
    sums to 1. num_singletons: clusters of one row that mode seeking found, before they were redistributed or discarded.
    """

    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_clusters: int
    roots: NDArray[np.int64]
    scores: NDArray[np.float64]
    num_singletons: int


def power_iteration_clustering(
    features: Features,
    *,
    num_neighbours: int = 5,
    sigma: float = 0.2,
    alpha: float = 0.001,
    iterations: int = 200,
    singletons: Singletons = "redistribute",
    search: Search = "exact",
    seed: int = 0,
) -> PowerIterationClustering:
    """See `raycluster.power_iteration_clustering`; bitwise identical for any blocks in any order."""
    _check(features.num_rows, num_neighbours, sigma, alpha, iterations, singletons)
    ids, distances = find_neighbours(features, num_neighbours, search=search, seed=seed)
    samples, _ = sorted_samples(features)
    graph = np.searchsorted(samples, ids), distances
    del ids, distances
    options: dict[str, Any] = {"sigma": sigma, "alpha": alpha, "iterations": iterations, "singletons": singletons}
    return cluster_graph(samples, *graph, **options)


def cluster_graph(
    samples: NDArray[np.int64],
    neighbours: NDArray[np.int64],
    distances: NDArray[np.floating],
    *,
    sigma: float,
    alpha: float,
    iterations: int,
    singletons: Singletons,
) -> PowerIterationClustering:
    """The clustering of a graph. samples: (N,) ascending. neighbours, distances: (N, k) as in `affinities`."""
    weights = affinities(neighbours, distances, sigma)
    excess = stationary_excess(weights, alpha, iterations)
    found = seek_modes(weights, excess)
    del weights
    roots, labels = np.unique(found, return_inverse=True)
    alone = np.bincount(labels) == 1
    if singletons == "redistribute":
        labels = redistribute(labels, neighbours)
    elif singletons == "discard":
        labels = np.where(alone[labels], -1, labels)
    kept, labels = _renumbered(labels, len(roots))
    scores = (1 + excess) / (1 + excess).sum()
    return PowerIterationClustering(samples, labels, len(kept), samples[roots[kept]], scores, int(alone.sum()))


def affinities(neighbours: NDArray[np.int64], distances: NDArray[np.floating], sigma: float) -> Weights:
    """W = A + A^T with A_ij = exp(-distance / sigma^2) for the neighbours j of i; mutual edges count twice.

    neighbours: (N, k) row numbers, none its own. distances: (N, k) squared. Raises UserError if all affinities vanish.
    """
    num_rows, width = neighbours.shape
    values = np.exp(distances.astype(np.float64) / -(sigma**2)).ravel()
    if not values.any():
        typical = float(np.sqrt(np.median(distances)))
        raise UserError(
            f"all affinities exp(-d^2 / sigma^2) are 0 at sigma = {sigma:g}, because neighbours are at distances of "
            f"about {typical:g}: choose sigma nearer to that, or normalise the rows (raycluster.whiten)"
        )
    index = np.int32 if 2 * neighbours.size < 2**31 else np.int64
    starts = np.arange(0, num_rows * width + 1, width, dtype=index)
    columns = neighbours.ravel().astype(index)
    directed = scipy.sparse.csr_array((values, columns, starts), shape=(num_rows, num_rows))
    directed.sort_indices()
    return directed + directed.T.tocsr()


def stationary_excess(weights: Weights, alpha: float, iterations: int) -> NDArray[np.float64]:
    """(N,) x of the stationary vector v = (1 + x) / sum(1 + x), after `iterations` steps from the uniform vector.

    A step is v <- (alpha W v + (1 - alpha) / N), divided by its sum. It is computed on x, since beside 1 / N the
    affinities of distant neighbours would be rounded away. At a fixed point further steps change nothing.
    """
    excess = np.zeros(weights.shape[0])
    for _ in range(iterations):
        factor = alpha / (1 - alpha) / (1 + excess.mean())
        updated = weights @ (1 + excess) * factor
        if np.array_equal(updated, excess):
            break
        excess = updated
    return excess


def seek_modes(weights: Weights, scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N,) the row where each row ends that follows argmax_j W_ij (score_j - score_i) while that is positive.

    Of equal values the lowest row is followed. Scores rise along every path, so it ends.
    """
    starts = range(0, weights.shape[0], _ROWS)  # in parts, to keep temporary arrays small
    pointers = np.concatenate([_steepest(weights[start : start + _ROWS], start, scores) for start in starts])
    while True:
        further = pointers[pointers]
        if np.array_equal(further, pointers):
            return pointers
        pointers = further


def _steepest(weights: Weights, first: int, scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """The row that each of these rows follows, itself where no other has a higher score. first: number of their first.

    weights: the rows of the graph that are asked for, (n, N).
    """
    pointers, degrees = np.arange(first, first + weights.shape[0]), np.diff(weights.indptr)
    linked = np.flatnonzero(degrees)
    starts = weights.indptr[linked]
    gains = weights.data * (scores[weights.indices] - np.repeat(scores[pointers], degrees))
    highest = np.maximum.reduceat(gains, starts) if len(starts) else gains
    best = gains == np.repeat(highest, degrees[linked])
    lowest = np.minimum.reduceat(np.where(best, weights.indices, len(scores)), starts) if len(starts) else starts
    climbs = highest > 0
    pointers[linked[climbs]] = lowest[climbs]
    return pointers


def redistribute(labels: NDArray[np.int64], neighbours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (N,) with each cluster of one row moved to the cluster of its nearest neighbour that is in a larger one.

    neighbours: (N, k) row numbers, nearest first. Clusters are those before any move; a row all of whose neighbours are
    in clusters of one row stays.
    """
    alone = np.bincount(labels)[labels] == 1
    rows = np.flatnonzero(alone)
    larger = ~alone[neighbours[rows]]
    nearest = neighbours[rows, larger.argmax(axis=1)]
    moved = larger.any(axis=1)
    result = labels.copy()
    result[rows[moved]] = labels[nearest[moved]]
    return result


def _renumbered(labels: NDArray[np.int64], num_clusters: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The clusters that have rows, and labels that count these only; -1 stays."""
    kept = np.flatnonzero(np.bincount(labels[labels >= 0], minlength=num_clusters))
    numbers = np.full(num_clusters + 1, -1)
    numbers[kept] = np.arange(len(kept))
    return kept, numbers[labels]


def _check(
    num_rows: int, num_neighbours: int, sigma: float, alpha: float, iterations: int, singletons: Singletons
) -> None:
    if not 1 <= num_neighbours < num_rows:
        raise UserError(
            f"num_neighbours must be at least 1 and below the number of rows, {num_rows}; seen {num_neighbours}"
        )
    if not 0 < sigma < np.inf or not sigma**2 > 0 or not 0 < alpha < 1 or iterations < 1:
        raise UserError(
            "sigma must be positive, alpha between 0 and 1 (both excluded) and iterations at least 1; seen "
            f"sigma={sigma!r}, alpha={alpha!r}, iterations={iterations}"
        )
    if singletons not in get_args(Singletons):
        raise UserError(f"singletons must be one of {', '.join(get_args(Singletons))}; seen {singletons!r}")
