"""The k nearest rows of a database, exactly: candidates by products with proven error bounds, decided in float64.

The compiled kernel skips, by 8-bit products, what must be farther than the k-th found so far; without it float32
products of all pairs are ranked. Either way the result depends on the rows alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cpu
from raycluster.clustering.search.assign import resolve_engine
from raycluster.clustering.search.centroids import PreparedCentroids
from raycluster.clustering.search.rerank import pair_distances
from raycluster.features.matrix import device

Found = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Sample ids (n, k) of the nearest rows so far and their squared distances, nearest first; NONE where there is none."""

NONE = np.iinfo(np.int64).max

_TILE_ROWS = 256
_EXTRA = 8
_UNCERTAIN_ROWS = 16


class Queries(NamedTuple):
    """Rows whose neighbours are looked for. values: (n, D). samples: (n,) their ids, which are not found.

    found: improved in place. Where it is NONE, its distance limits what may be found there.
    """

    values: NDArray[np.float32]
    samples: NDArray[np.int64]
    found: Found

    @property
    def farthest(self) -> NDArray[np.float64]:
        """(n,) squared distance of the k-th nearest so far."""
        return self.found[1][:, -1]

    def chosen(self, places: NDArray[np.int64]) -> Queries:
        """A copy of some of them."""
        return Queries(self.values[places], self.samples[places], (self.found[0][places], self.found[1][places]))


class Database(NamedTuple):
    """Rows that are searched, and their sample ids (m,)."""

    rows: PreparedCentroids
    samples: NDArray[np.int64]


def unknown(
    values: NDArray[np.floating], samples: NDArray[np.int64], k: int, limits: float | NDArray[np.float64] = np.inf
) -> Queries:
    """Queries of which nothing is found yet. limits: (n,) or one squared distance; no row beyond is found."""
    distances = np.empty((len(samples), k))
    distances[:] = np.reshape(limits, (-1, 1))
    return Queries(np.ascontiguousarray(values, np.float32), samples, (np.full(distances.shape, NONE), distances))


def improve(queries: Queries, database: Database, places: NDArray[np.intp] | None = None) -> None:
    """Replace what was found so far by rows of the database that are nearer, or as near with a lower sample id.

    places: of some queries, ascending; the others are left as they are.
    """
    places, packed = np.arange(len(queries.samples)) if places is None else places, database.rows.packed
    if packed is not None and resolve_engine("auto") == "int8":
        int8_cpu.nearest(queries.values, queries.samples, places, packed, database.samples, queries.found)
        return
    for start in range(0, len(places), _TILE_ROWS):
        rows = places[start : start + _TILE_ROWS]
        tile = queries.chosen(rows)
        (ids, distances), (more_ids, more_distances) = tile.found, _search_tile(tile, database)
        both = np.hstack([ids, more_ids]), np.hstack([distances, more_distances])
        queries.found[0][rows], queries.found[1][rows] = best(*both, ids.shape[1])


def best(ids: NDArray[np.int64], distances: NDArray[np.float64], k: int) -> Found:
    """The k nearest of each row, of (n, m) candidates."""
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _ranked(queries: Queries, database: Database, rows: NDArray[np.intp], columns: NDArray[np.int64]) -> Found:
    """The nearest among candidates: pairs of a query (ascending) and a row of the database."""
    distances = pair_distances(queries.values, rows, database.rows.centroids, columns)
    kept = (distances <= queries.farthest[rows]) & (database.samples[columns] != queries.samples[rows])
    rows, found, distances = rows[kept], database.samples[columns[kept]], distances[kept]
    order = np.lexsort((found, distances, rows))
    rank, width = np.arange(len(rows)) - np.searchsorted(rows, rows), queries.found[0].shape[1]
    order, rank = order[rank < width], rank[rank < width]
    ids, nearest = np.full((len(queries.samples), width), NONE), np.full((len(queries.samples), width), np.inf)
    ids[rows[order], rank], nearest[rows[order], rank] = found[order], distances[order]
    return ids, nearest


def _search_tile(queries: Queries, database: Database) -> Found:
    """The nearest rows of a tile, among all candidates that rounding errors could hide."""
    where, prepared = device(), database.rows
    rows = torch.from_numpy(queries.values - prepared.centre).to(where)
    scores = torch.addmm(prepared.offsets.to(where), rows, prepared.centred.to(where).T)
    width = min(queries.found[0].shape[1], len(database.samples))
    num_candidates = min(width + 1 + _EXTRA, len(database.samples))
    highest, columns = scores.topk(num_candidates, dim=1)
    error = prepared.score_error(torch.linalg.vector_norm(rows, dim=1))
    # One more than requested, because one of them may be the row itself.
    floor = (highest[:, min(width, num_candidates - 1)] - error)[:, None]
    likely = ~(highest < floor)
    found = _ranked(queries, database, _numpy(torch.nonzero(likely)[:, 0]), _numpy(columns[likely]))
    uncertain = torch.nonzero(likely[:, -1])[:, 0] if num_candidates < len(database.samples) else columns[:0, 0]
    for some in uncertain.split(_UNCERTAIN_ROWS):
        row_ids, column_ids = map(_numpy, torch.nonzero(~(scores[some] < floor[some])).T)
        chosen = _numpy(some)
        found[0][chosen], found[1][chosen] = _ranked(queries.chosen(chosen), database, row_ids, column_ids)
    return found


def _numpy(tensor: torch.Tensor) -> NDArray[np.int64]:
    array: NDArray[np.int64] = tensor.cpu().numpy()
    return array
