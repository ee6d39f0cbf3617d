"""The graph of exact k nearest neighbours: every block is compared with the database, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.search.centroids import prepare
from raycluster.clustering.search.nearest_rows import NONE, Database, Found, best, improve, unknown
from raycluster.features.matrix import feature_stats, sample_ids
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

_FIRST_ROWS = 1 << 10
_MOST_ROWS = 1 << 14
_QUERY_ROWS = 1 << 12


def neighbours(features: Features, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(N, k) sample ids of the nearest other rows and their squared distances, by ascending sample id of the row.

    Ties are in ascending order of sample id. The database is searched in parts, so memory is bounded; what was found in
    the earlier parts limits the search of the later ones.
    """
    check_neighbours(features, k)
    samples, order = sorted_samples(features)
    ids, distances = np.full((len(samples), k), NONE), np.full((len(samples), k), np.inf)
    for part in _parts(samples):
        database = Database(prepare(features.rows(part)), part)
        found = features.collect(_search_block, database, k, samples, distances[:, -1])
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


def _search_block(
    block: Block, database: Database, k: int, samples: NDArray[np.int64], limits: NDArray[np.float64]
) -> Found:
    """What is nearest to the rows of a block. samples: all sample ids, ascending. limits: (N,) in their order."""
    own, ids, distances = np.searchsorted(samples, block.samples), [], []
    for start in range(0, max(len(own), 1), _QUERY_ROWS):
        part = slice(start, start + _QUERY_ROWS)
        queries = unknown(block.values[part], block.samples[part], k, limits[own[part]])
        improve(queries, database)
        ids.append(queries.found[0])
        distances.append(queries.found[1])
    return np.concatenate(ids), np.concatenate(distances)
