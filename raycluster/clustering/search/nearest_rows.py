"""The k nearest rows of a database, exactly: candidates by products with proven error bounds, decided in float64.

Where it is known how far the k-th nearest is at most, the compiled kernel finds the rows within that distance by 8-bit
products; otherwise float32 products of all pairs are ranked. Either way the result depends on the rows alone.
"""

from __future__ import annotations

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
_MAX_BOUNDED = (
    int8_cpu.CANDIDATES // 3
)  # with more neighbours, too many rows have more candidates than the kernel keeps


def nearest_rows(
    values: NDArray[np.floating],
    own: NDArray[np.int64],
    prepared: PreparedCentroids,
    part: NDArray[np.int64],
    k: int,
    limits: NDArray[np.float64],
) -> Found:
    """The k nearest rows of a part of the database, of equal distances the lowest sample ids.

    values: (n, D). own: (n,) their sample ids, which are not found. prepared, part: rows of the database and their
    sample ids, ascending. limits: (n,) squared distances; rows beyond may be missing.
    """
    width = min(k, len(part))
    ids, distances = np.full((len(own), width), -1), np.full((len(own), width), np.inf)
    left = np.ones(len(own), bool)
    bounded = np.flatnonzero(np.isfinite(limits))
    if len(bounded) and k <= _MAX_BOUNDED and resolve_engine("auto") == "int8" and prepared.packed is not None:
        rows = values[bounded].astype(np.float32, copy=False)
        done, *found = _within_limits(rows, own[bounded], prepared, part, width, limits[bounded])
        ids[bounded], distances[bounded] = found
        left[bounded[done]] = False
    rest = np.flatnonzero(left)
    for start in range(0, len(rest), _TILE_ROWS):
        rows = rest[start : start + _TILE_ROWS]
        tile = values[rows].astype(np.float32, copy=False)
        ids[rows], distances[rows] = _search_tile(tile, own[rows], prepared, part, width)
    return ids, distances


def best(ids: NDArray[np.int64], distances: NDArray[np.float64], k: int) -> Found:
    """The k nearest of each row, of (n, m) candidates."""
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _within_limits(
    values: NDArray[np.float32],
    own: NDArray[np.int64],
    prepared: PreparedCentroids,
    part: NDArray[np.int64],
    width: int,
    limits: NDArray[np.float64],
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float64]]:
    """Whether a row was searched, and what was found, by the compiled kernel."""
    assert prepared.packed is not None
    counts, columns = int8_cpu.reaching(values, prepared.packed, _floors(values, prepared, limits))
    rows = np.repeat(np.arange(len(values)), counts.clip(0))
    columns = columns[np.arange(columns.shape[1]) < counts[:, None]]
    return counts >= 0, *_ranked(values, own, prepared, part, rows, columns, width, limits)


def _ranked(
    values: NDArray[np.float32],
    own: NDArray[np.int64],
    prepared: PreparedCentroids,
    part: NDArray[np.int64],
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    width: int,
    limits: NDArray[np.float64],
) -> Found:
    """The nearest of `part` for each row, among candidates: pairs of a row (ascending) and a column."""
    distances = pair_distances(values, rows, prepared.centroids, columns)
    kept = (distances <= limits[rows]) & (part[columns] != own[rows])
    rows, found, distances = rows[kept], part[columns[kept]], distances[kept]
    order = np.lexsort((found, distances, rows))
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    order, rank = order[rank < width], rank[rank < width]
    ids, nearest = np.full((len(values), width), -1), np.full((len(values), width), np.inf)
    ids[rows[order], rank], nearest[rows[order], rank] = found[order], distances[order]
    return ids, nearest


def _floors(
    values: NDArray[np.float32], prepared: PreparedCentroids, limits: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(n,) the score x.c - |c|^2 / 2 about the centre at these squared distances, or slightly less."""
    with np.errstate(over="ignore", invalid="ignore"):  # the kernel leaves out rows whose squares leave float32
        rows = values - prepared.centre
        squares = np.einsum("ij,ij->i", rows, rows)
        margins = squares * ((rows.shape[1] + 8) * 2.0**-22) + limits * 2.0**-22  # twice the rounding errors at least
        floors: NDArray[np.float32] = ((squares - limits) / 2 - margins).astype(np.float32)
    return floors


def _search_tile(
    values: NDArray[np.float32],
    own: NDArray[np.int64],
    prepared: PreparedCentroids,
    part: NDArray[np.int64],
    width: int,
) -> Found:
    """The nearest of `part` for each row, among all candidates that rounding errors could hide."""
    target_device, limits = device(), np.full(len(values), np.inf)
    rows = torch.from_numpy(values - prepared.centre).to(target_device)
    scores = torch.addmm(prepared.offsets.to(target_device), rows, prepared.centred.to(target_device).T)
    num_candidates = min(width + 1 + _EXTRA, len(part))
    highest, columns = scores.topk(num_candidates, dim=1)
    error = prepared.score_error(torch.linalg.vector_norm(rows, dim=1))
    # One more than requested, because one of them may be the row itself.
    floor = highest[:, min(width, num_candidates - 1)] - error
    likely = ~(highest < floor[:, None])
    row_ids, column_ids = torch.nonzero(likely)[:, 0].cpu().numpy(), columns[likely].cpu().numpy()
    ids, distances = _ranked(values, own, prepared, part, row_ids, column_ids, width, limits)
    uncertain = torch.nonzero(~(highest[:, -1] < floor))[:, 0] if num_candidates < len(part) else columns[:0, 0]
    for some in uncertain.split(_UNCERTAIN_ROWS):
        row_ids, column_ids = (index.cpu().numpy() for index in torch.nonzero(~(scores[some] < floor[some, None])).T)
        chosen = some.cpu().numpy()
        ids[chosen], distances[chosen] = _ranked(
            values[chosen], own[chosen], prepared, part, row_ids, column_ids, width, limits[chosen]
        )
    return ids, distances
