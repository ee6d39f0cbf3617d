"""Exact k nearest neighbours: candidates by float32 products, decided by float64 distances."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search.centroids import PreparedCentroids, prepare
from raycluster.clustering.search.rerank import pair_distances
from raycluster.features.matrix import device, feature_stats
from raycluster.types import Block, Features, UserError

_DATABASE_ROWS = 1 << 14
_TILE_ROWS = 256
_EXTRA = 8


def neighbours(features: Features, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(N, k) sample ids of the nearest other rows and their squared distances, by ascending sample id of the row.

    Ties are in ascending order of sample id. The database is searched in parts, so memory is bounded.
    """
    num_rows = feature_stats(features).num_rows
    if not 1 <= k < num_rows:
        raise UserError(f"k must be at least 1 and below the number of rows, {num_rows}; seen {k}")
    samples = np.concatenate(features.collect(_samples))
    order = np.argsort(samples)
    database = samples[order]
    ids, distance = np.empty((num_rows, 0), np.int64), np.empty((num_rows, 0))
    for start in range(0, num_rows, _DATABASE_ROWS):
        part = database[start : start + _DATABASE_ROWS]
        found = features.collect(_search, prepare(features.rows(part)), part, k)
        new_ids, new_distance = (np.concatenate(column)[order] for column in zip(*found, strict=True))
        ids, distance = _best(np.hstack([ids, new_ids]), np.hstack([distance, new_distance]), k)
    return ids, distance.astype(np.float32)


def _best(
    ids: NDArray[np.int64], distance: NDArray[np.float64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest of each row; id -1 stands for none, infinitely far."""
    order = np.lexsort((ids, distance), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(distance, order, axis=1)


def _search(
    block: Block, prepared: PreparedCentroids, part: NDArray[np.int64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    width = min(k, len(part))
    ids, distance = np.full((len(block.samples), width), -1), np.full((len(block.samples), width), np.inf)
    for start in range(0, len(block.samples), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        values = block.values[rows].astype(np.float32, copy=False)
        ids[rows], distance[rows] = _search_tile(values, block.samples[rows], prepared, part, width)
    return ids, distance


def _search_tile(
    values: NDArray[np.float32],
    own: NDArray[np.int64],
    prepared: PreparedCentroids,
    part: NDArray[np.int64],
    width: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest of `part` for each row, among all candidates that rounding errors could hide."""
    target_device = device()
    rows = torch.from_numpy(values - prepared.centre).to(target_device)
    scores = torch.addmm(prepared.offsets.to(target_device), rows, prepared.centred.to(target_device).T)
    num_candidates = min(width + 1 + _EXTRA, len(part))
    best, columns = scores.topk(num_candidates, dim=1)
    error = prepared.score_error(torch.linalg.vector_norm(rows, dim=1))
    # One more than requested, because one of them may be the row itself.
    floor = best[:, min(width, num_candidates - 1)] - error
    uncertain = (~(best[:, -1] < floor)).cpu().numpy() if num_candidates < len(part) else np.zeros(len(values), bool)
    ids, distance = _exact_distances(values, own, prepared, part, columns.cpu().numpy())
    ids, distance = _best(ids, distance, width)
    for row in np.flatnonzero(uncertain):
        column_ids = torch.nonzero(~(scores[row] < floor[row]))[:, 0].cpu().numpy()
        row_slice = slice(row, row + 1)
        ids[row_slice], distance[row_slice] = _best(
            *_exact_distances(values[row_slice], own[row_slice], prepared, part, column_ids[None]), width
        )
    return ids, distance


def _exact_distances(
    values: NDArray[np.float32],
    own: NDArray[np.int64],
    prepared: PreparedCentroids,
    part: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and exact distances of these columns; the row itself is infinitely far."""
    rows = np.repeat(np.arange(len(values)), columns.shape[1])
    distance = pair_distances(values, rows, prepared.centroids, columns.ravel()).reshape(columns.shape)
    ids = part[columns]
    distance[ids == own[:, None]] = np.inf
    return np.where(np.isinf(distance), -1, ids), distance


def _samples(block: Block) -> NDArray[np.int64]:
    return block.samples
