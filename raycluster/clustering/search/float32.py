"""Nearest centroids by float32 products of a library: torch on any device, or faiss.

A float32 product separates all but a few near-ties. Rows whose two best scores differ by less than its error bound
(see `bounds`) are decided in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search.centroids import PreparedCentroids
from raycluster.clustering.search.rerank import nearest_in_float64
from raycluster.features.matrix import device

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Labels (n,) of rows (n, D)."""

_TILE_ROWS = {"cpu": 256, "cuda": 1 << 16}
_TILE_SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}
_FAISS_ROWS = 4096


def in_tiles(values: NDArray[np.floating], search: Search, size: int) -> NDArray[np.int64]:
    """Labels (n,) of rows (n, D), searched `size` rows at a time."""
    labels = np.empty(len(values), np.int64)
    for start in range(0, len(values), size):
        labels[start : start + size] = search(values[start : start + size].astype(np.float32, copy=False))
    return labels


def float_search(prepared: PreparedCentroids) -> tuple[Search, int]:
    """A search by product scores x.c - |c|^2 / 2, and its number of rows per call."""
    where = device()
    centred, offsets = prepared.centred.to(where), prepared.offsets.to(where)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = torch.from_numpy(tile - prepared.centre).to(where)
        scores = torch.addmm(offsets, rows, centred.T)
        best, labels = _argmax(scores)
        scores.scatter_(1, labels, -torch.inf)
        second = scores.amax(dim=1, keepdim=True)
        error_bound = prepared.score_error(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        # Negated, so that NaN of an overflow counts as too close; likewise the candidates.
        doubtful = (~(best - second > error_bound))[:, 0]
        result: NDArray[np.int64] = labels[:, 0].cpu().numpy()
        if doubtful.any():
            scores.scatter_(1, labels, best)
            candidates = ~(scores[doubtful] < (best - error_bound)[doubtful])
            doubtful_rows = doubtful.cpu().numpy()
            row_ids, columns = np.nonzero(candidates.cpu().numpy())
            result[doubtful_rows] = nearest_in_float64(tile[doubtful_rows], row_ids, columns, prepared.centroids)
        return result

    size = min(_TILE_ROWS[where.type], max(64, _TILE_SCORES[where.type] // len(prepared.centroids)))
    return search, size


def faiss_search(prepared: PreparedCentroids) -> tuple[Search, int]:
    """The same search, with candidates by faiss's flat index."""
    import faiss  # takes a second to import, and is rarely used

    index = faiss.IndexFlatL2(len(prepared.centre))
    index.add(prepared.centred.numpy())
    search_again, _ = float_search(prepared)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = tile - prepared.centre
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        distances, columns = index.search(rows, min(2, index.ntotal))
        faiss.omp_set_num_threads(threads)
        labels: NDArray[np.int64] = columns[:, 0].copy()
        error_bound = prepared.distance_error(np.linalg.norm(rows, axis=1))
        doubtful = ~(distances[:, -1] - distances[:, 0] > error_bound)
        if doubtful.any():
            labels[doubtful] = search_again(tile[doubtful])
        return labels

    return search, _FAISS_ROWS


def _argmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest score of each row and its column, both (n, 1); any column among equals."""
    if scores.device.type == "cpu":  # numpy's search is vectorised, ten times as fast as torch's
        columns = torch.from_numpy(scores.numpy().argmax(axis=1))[:, None]
    else:
        columns = scores.argmax(dim=1, keepdim=True)
    return scores.gather(1, columns), columns
