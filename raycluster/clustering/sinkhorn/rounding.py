"""Labels of exact sizes: rows leave clusters that are too large by the cheapest chains of moves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

_TINY = 1e-9


class Choices(NamedTuple):
    """The best clusters of each row, best first. clusters: (N, L) int32, -1 where there are fewer.

    scores: (N, L) sharpness * log p + u, -inf there.
    """

    clusters: NDArray[np.int32]
    scores: NDArray[np.float64]


class _Moves(NamedTuple):
    """The cheapest move between each two clusters that have one. source, destination, row: (M,). loss: (M,) >= 0."""

    source: NDArray[np.intp]
    destination: NDArray[np.intp]
    row: NDArray[np.intp]
    loss: NDArray[np.float64]


def whole_sizes(prior: NDArray[np.float64], num_rows: int) -> NDArray[np.int64]:
    """(K,) whole sizes with sum N: N * prior rounded down or up, up where most is lost, the lowest of equal ones."""
    wanted = prior * num_rows
    sizes = np.floor(wanted + _TINY).astype(np.int64)
    short = num_rows - int(sizes.sum())
    order = np.argsort(np.where(prior > 0, np.round(sizes - wanted, 9), np.inf), kind="stable")
    sizes[order[:short]] += 1
    return sizes


def round_to_sizes(choices: Choices, sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Labels (N,), -1 for rows that found no way to a cluster with room among their choices.

    A transport problem by successive shortest paths (Busacker and Gowen 1960) from the best choice of every row, which
    is optimal for the sizes it happens to have; several paths at a time if they move different rows.
    """
    labels = choices.clusters[:, 0].copy()
    excess = np.bincount(labels, minlength=len(sizes)) - sizes
    while (excess > 0).any():
        moves = _moves(choices, labels, len(sizes))
        if not _push(moves, labels, excess):
            break
    _unassign_excess(choices, labels, excess)
    return labels


def _moves(choices: Choices, labels: NDArray[np.int32], num_clusters: int) -> _Moves:
    current = np.where(choices.clusters == labels[:, None], choices.scores, -np.inf).max(axis=1)
    row, place = np.nonzero((choices.clusters >= 0) & (choices.clusters != labels[:, None]))
    source, destination = labels[row].astype(np.intp), choices.clusters[row, place].astype(np.intp)
    loss = np.maximum(current[row] - choices.scores[row, place], 0)
    order = np.lexsort((row, loss, source * num_clusters + destination))
    key = (source * num_clusters + destination)[order]
    order = order[np.flatnonzero(np.diff(key, prepend=-1))]
    return _Moves(source[order], destination[order], row[order], loss[order])


def _push(moves: _Moves, labels: NDArray[np.int32], excess: NDArray[np.int64]) -> int:
    """Move rows along the shortest paths from clusters too large to clusters too small, in place; how many paths."""
    num_clusters = len(excess)
    shape = (num_clusters, num_clusters)
    graph = csr_array((moves.loss + _TINY, (moves.source, moves.destination)), shape=shape)
    found = dict(
        zip(zip(moves.source.tolist(), moves.destination.tolist(), strict=True), moves.row.tolist(), strict=True)
    )
    sources = np.flatnonzero(excess > 0)
    distance, predecessor, _ = dijkstra(graph, indices=sources, min_only=True, return_predecessors=True)
    ends = np.flatnonzero((excess < 0) & np.isfinite(distance))
    taken: set[int] = set()
    pushed = 0
    for end in ends[np.argsort(distance[ends], kind="stable")].tolist():
        path = [end]
        while predecessor[path[-1]] >= 0:
            path.append(int(predecessor[path[-1]]))
        rows = [found[pair] for pair in zip(path[1:], path[:-1], strict=True)]
        if excess[path[-1]] <= 0 or taken.intersection(rows):
            continue
        labels[rows] = path[:-1]
        excess[path[-1]] -= 1
        excess[end] += 1
        taken.update(rows)
        pushed += 1
    return pushed


def _unassign_excess(choices: Choices, labels: NDArray[np.int32], excess: NDArray[np.int64]) -> None:
    """Mark as many rows as there are too many, those that are least sure of their cluster."""
    margin = choices.scores[:, 0] - (choices.scores[:, 1] if choices.scores.shape[1] > 1 else -np.inf)
    for cluster in np.flatnonzero(excess > 0):
        rows = np.flatnonzero(labels == cluster)
        labels[rows[np.argsort(margin[rows], kind="stable")[: excess[cluster]]]] = -1
