"""The graph of exact k nearest neighbours: every block is compared with the database, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.search.centroids import prepare
from raycluster.clustering.search.nearest_rows import Database, Found, Queries, best, nearest_rows
from raycluster.features.matrix import feature_stats, sample_ids
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

_FIRST_ROWS = 1 << 10
_MOST_ROWS = 1 << 14


def neighbours(features: Features, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(N, k) sample ids of the nearest other rows and their squared distances, by ascending sample id of the row.

    Ties are in ascending order of sample id. The database is searched in parts, so memory is bounded; what was found in
    the earlier parts limits the search of the later ones.
    """
    check_neighbours(features, k)
    samples, order = sorted_samples(features)
    ids, distances = np.empty((len(samples), 0), np.int64), np.empty((len(samples), 0))
    for part in _parts(samples):
        limits = distances[:, k - 1] if distances.shape[1] == k else np.full(len(samples), np.inf)
        found = features.collect(search_block, Database(prepare(features.rows(part)), part), k, samples, limits)
        new_ids, new_distances = (np.concatenate(column)[order] for column in zip(*found, strict=True))
        ids, distances = best(np.hstack([ids, new_ids]), np.hstack([distances, new_distances]), k)
    return ids, distances.astype(np.float32)


def check_neighbours(features: Features, k: int) -> None:
    """Raise UserError if a row does not have k others, or values are NaN or infinite."""
    num_rows = feature_stats(features).num_rows
    if not 1 <= k < num_rows:
        raise UserError(f"k must be at least 1 and below the number of rows, {num_rows}; seen {k}")


def sorted_samples(features: Features) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """All sample ids (N,), ascending, and the positions of these among the rows of the blocks in shard order."""
    samples = sample_ids(features)
    order = np.argsort(samples)
    return samples[order], order


def _parts(samples: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Sample ids in random parts. Each has at most as many as all before it, so few are nearer than those found."""
    shuffled, start = generator(0, "knn parts").permutation(samples), 0
    while start < len(samples):
        size = min(max(start, _FIRST_ROWS), _MOST_ROWS)
        yield np.sort(shuffled[start : start + size])
        start += size


def search_block(
    block: Block, database: Database, k: int, samples: NDArray[np.int64], limits: NDArray[np.float64]
) -> Found:
    """`nearest_rows` of a block. samples: all sample ids, ascending. limits: (N,) in their order."""
    own = np.searchsorted(samples, block.samples)
    return nearest_rows(Queries(block.values, block.samples, limits[own]), database, k)
