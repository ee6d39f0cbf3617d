"""All pairs of rows within a distance, exactly: candidates by products with proven error bounds, decided in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cpu
from raycluster.clustering.search.assign import resolve_engine
from raycluster.clustering.search.centroids import PreparedCentroids, prepare
from raycluster.clustering.search.nearest_rows import Database, Queries, score_floors
from raycluster.clustering.search.rerank import pair_distances
from raycluster.features.matrix import device
from raycluster.features.selected import SelectedRows
from raycluster.seeding import generator
from raycluster.types import Block, Features

_PART_PAIRS = 1 << 22  # expected of one part of the database
_MOST_ROWS = 1 << 12
_MOST_BYTES = 1 << 28
_GROWTH = 8
_TILE_ROWS = 256
_MAX_NORM = 2.0**60  # squares of longer rows may leave float32


class Pairs(NamedTuple):
    """Pairs of rows. low < high: (p,) int32 row numbers. distances: (p,) float64, Euclidean."""

    low: NDArray[np.int32]
    high: NDArray[np.int32]
    distances: NDArray[np.float64]

    def chosen(self, places: NDArray[np.generic]) -> Pairs:
        """Some of them. places: indices or a mask."""
        return Pairs(self.low[places], self.high[places], self.distances[places])


def concatenate(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts, of which there is at least one, in order."""
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def close_pairs(features: Features, samples: NDArray[np.int64], threshold: float) -> Iterator[Pairs]:
    """All pairs of rows at most `threshold` apart, each once, a few million at a time, in any order.

    samples: (N,) all sample ids, ascending; rows are numbered in this order. The database is searched in random parts,
    whose pairs are therefore about as dense as those of the parts before: this bounds the pairs that are yielded.
    """
    left = generator(0, "close pairs").permutation(samples)
    most = min(_MOST_ROWS, max(_TILE_ROWS, _MOST_BYTES // (4 * features.dim)))
    size = min(max(1, _PART_PAIRS // len(samples)), most)
    while len(left):
        part = np.sort(left[:size])
        database = Database(prepare(features.rows(part)), part)
        found = SelectedRows(features, left).collect(pairs_of_block, database, samples, threshold)
        pairs = concatenate(found)
        per_row = (len(pairs.low) + 1) / len(part)
        size = max(1, min(_GROWTH * len(part), int(_PART_PAIRS / per_row), most))
        left = left[len(part) :]
        yield pairs


def pairs_of_block(block: Block, database: Database, samples: NDArray[np.int64], threshold: float) -> Pairs:
    """The pairs of a row of the block and one of the database; once where both rows are in both."""
    own, others = np.searchsorted(samples, block.samples), np.searchsorted(samples, database.samples)
    last = np.where(np.isin(block.samples, database.samples), own, len(samples))  # only earlier rows of the database
    found = []
    for start in range(0, max(1, len(own)), _TILE_ROWS):
        tile = slice(start, start + _TILE_ROWS)
        rows, columns, distances = _close(block.values[tile].astype(np.float32, copy=False), database.rows, threshold)
        left, right = own[tile][rows], others[columns]
        kept = right < last[tile][rows]
        left, right = left[kept].astype(np.int32), right[kept].astype(np.int32)
        found.append(Pairs(np.minimum(left, right), np.maximum(left, right), distances[kept]))
    return concatenate(found)


def _close(
    values: NDArray[np.float32], database: PreparedCentroids, threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rows of a tile, rows of the database at most `threshold` from them, and the distances."""
    with np.errstate(over="ignore"):
        limits = np.full(len(values), np.square(np.float64(threshold)) * (1 + 2.0**-40))
    floors = score_floors(Queries(values, np.empty(0, np.int64), limits), database)
    counts, found = _by_kernel(values, database, floors)
    rows, places = np.nonzero(np.arange(found.shape[1]) < counts[:, None])
    columns, rest = found[rows, places].astype(np.int64), np.flatnonzero(counts < 0)
    if len(rest):
        more_rows, more_columns = _by_products(values[rest], database, floors[rest])
        rows, columns = np.append(rows, rest[more_rows]), np.append(columns, more_columns)
    distances = np.sqrt(pair_distances(values, rows, database.centroids, columns))
    kept = distances <= threshold
    return rows[kept], columns[kept], distances[kept]


def _by_kernel(
    values: NDArray[np.float32], database: PreparedCentroids, floors: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """As `int8_cpu.reaching`; all rows are left to the caller where there is no kernel."""
    if resolve_engine("auto") == "int8" and database.packed is not None:
        return int8_cpu.reaching(values, database.packed, floors)
    return np.full(len(values), -1, np.int32), np.empty((len(values), 0), np.int32)


def _by_products(
    values: NDArray[np.float32], database: PreparedCentroids, floors: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of float32 scores that reach the floors, or that rounding errors could hide."""
    where = device()
    with np.errstate(over="ignore", invalid="ignore"):
        rows = torch.from_numpy(values - database.centre).to(where)
    scores = torch.addmm(database.offsets.to(where), rows, database.centred.to(where).T)
    norms = torch.linalg.vector_norm(rows, dim=1)
    lowest = torch.from_numpy(floors).to(where) - database.score_error(norms)
    lowest[~(norms.clamp(min=database.max_norm) < _MAX_NORM)] = -torch.inf
    places = torch.nonzero((~(scores < lowest[:, None])).ravel())[:, 0].cpu().numpy()  # negated: NaN of an overflow
    return np.divmod(places, scores.shape[1])
