"""The k nearest rows of a database, exactly: candidates by products with proven error bounds, decided in float64.

Where it is known how far the k-th nearest is at most, the compiled kernel finds the rows within that distance by 8-bit
products; otherwise float32 products of all pairs are ranked. Either way the result depends on the rows alone.
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
"""Sample ids (n, k) of the nearest rows and their squared distances, nearest first; -1, infinitely far, for none."""

_TILE_ROWS = 256
_EXTRA = 8
_UNCERTAIN_ROWS = 16
_MAX_BOUNDED = int8_cpu.CANDIDATES // 3  # with a larger k too many rows have more candidates than the kernel keeps


class Queries(NamedTuple):
    """Rows whose neighbours are looked for. values: (n, D). samples: (n,) their ids, which are not found.

    limits: (n,) squared distances, infinite for none; rows beyond may be missing.
    """

    values: NDArray[np.floating]
    samples: NDArray[np.int64]
    limits: NDArray[np.float64]

    def chosen(self, rows: NDArray[np.intp]) -> Queries:
        """Some of them, in float32."""
        return Queries(self.values[rows].astype(np.float32, copy=False), self.samples[rows], self.limits[rows])


class Database(NamedTuple):
    """Rows that are searched, and their sample ids (m,)."""

    rows: PreparedCentroids
    samples: NDArray[np.int64]


def nearest_rows(queries: Queries, database: Database, k: int) -> Found:
    """The min(k, m) nearest rows of the database within the limits, of equal distances the lowest sample ids."""
    width = min(k, len(database.samples))
    ids, distances = _none(len(queries.samples), width)
    left = np.ones(len(ids), bool)
    bounded = np.flatnonzero(np.isfinite(queries.limits))
    if len(bounded) and k <= _MAX_BOUNDED and resolve_engine("auto") == "int8" and database.rows.packed is not None:
        done, (ids[bounded], distances[bounded]) = _within_limits(queries.chosen(bounded), database, width)
        left[bounded[done]] = False
    rest = np.flatnonzero(left)
    for start in range(0, len(rest), _TILE_ROWS):
        rows = rest[start : start + _TILE_ROWS]
        ids[rows], distances[rows] = _search_tile(queries.chosen(rows), database, width)
    return ids, distances


def best(ids: NDArray[np.int64], distances: NDArray[np.float64], k: int) -> Found:
    """The k nearest of each row, of (n, m) candidates."""
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _none(num_rows: int, width: int) -> Found:
    return np.full((num_rows, width), -1), np.full((num_rows, width), np.inf)


def _within_limits(queries: Queries, database: Database, width: int) -> tuple[NDArray[np.bool_], Found]:
    """Which rows the compiled kernel could search, and what it found."""
    assert database.rows.packed is not None
    counts, found = int8_cpu.reaching(queries.values, database.rows.packed, score_floors(queries, database.rows))
    rows = np.repeat(np.arange(len(counts)), counts.clip(0))
    columns = found[np.arange(found.shape[1]) < counts[:, None]].astype(np.int64)
    return counts >= 0, _ranked(queries, database, rows, columns, width)


def score_floors(queries: Queries, database: PreparedCentroids) -> NDArray[np.float32]:
    """(n,) the score x.c - |c|^2 / 2 about the centre at the limits, or slightly less."""
    with np.errstate(over="ignore", invalid="ignore"):  # the kernel leaves out rows whose squares leave float32
        rows = queries.values - database.centre
        squares = np.einsum("ij,ij->i", rows, rows)
        # At least twice the rounding errors.
        margins = squares * ((rows.shape[1] + 8) * 2.0**-22) + queries.limits * 2.0**-22
        floors: NDArray[np.float32] = ((squares - queries.limits) / 2 - margins).astype(np.float32)
    return floors


def _ranked(
    queries: Queries, database: Database, rows: NDArray[np.intp], columns: NDArray[np.int64], width: int
) -> Found:
    """The nearest among candidates: pairs of a query (ascending) and a row of the database."""
    distances = pair_distances(queries.values, rows, database.rows.centroids, columns)
    kept = (distances <= queries.limits[rows]) & (database.samples[columns] != queries.samples[rows])
    rows, found, distances = rows[kept], database.samples[columns[kept]], distances[kept]
    order = np.lexsort((found, distances, rows))
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    order, rank = order[rank < width], rank[rank < width]
    ids, nearest = _none(len(queries.samples), width)
    ids[rows[order], rank], nearest[rows[order], rank] = found[order], distances[order]
    return ids, nearest


def _search_tile(queries: Queries, database: Database, width: int) -> Found:
    """The nearest rows of a tile, among all candidates that rounding errors could hide."""
    where, prepared = device(), database.rows
    rows = torch.from_numpy(queries.values - prepared.centre).to(where)
    scores = torch.addmm(prepared.offsets.to(where), rows, prepared.centred.to(where).T)
    num_candidates = min(width + 1 + _EXTRA, len(database.samples))
    highest, columns = scores.topk(num_candidates, dim=1)
    error = prepared.score_error(torch.linalg.vector_norm(rows, dim=1))
    # One more than requested, because one of them may be the row itself.
    floor = (highest[:, min(width, num_candidates - 1)] - error)[:, None]
    likely = ~(highest < floor)
    found = _ranked(queries, database, _numpy(torch.nonzero(likely)[:, 0]), _numpy(columns[likely]), width)
    uncertain = torch.nonzero(likely[:, -1])[:, 0] if num_candidates < len(database.samples) else columns[:0, 0]
    for some in uncertain.split(_UNCERTAIN_ROWS):
        row_ids, column_ids = map(_numpy, torch.nonzero(~(scores[some] < floor[some])).T)
        chosen = _numpy(some)
        again = _ranked(queries.chosen(chosen), database, row_ids, column_ids, width)
        found[0][chosen], found[1][chosen] = again
    return found


def _numpy(tensor: torch.Tensor) -> NDArray[np.int64]:
    array: NDArray[np.int64] = tensor.cpu().numpy()
    return array
