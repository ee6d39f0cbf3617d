"""The search of engine="torch" on processors with 8-bit dot products (VNNI): several times as fast as float32.

A row x and a centroid c (both about the centroids' mean) are rounded to 8 bits with a scale each, x = s X + dx and
c = S C + dC. Then |x.c - s S X.C| <= |dx| |c| + (|x| + |dx|) |dc| (Cauchy-Schwarz), where all norms are known: every
score x.c - |c|^2 / 2 has an upper end. The float32 score of the centroid whose upper end is highest bounds the best
from below, which excludes most. The rest are computed in float32, near-ties in float64. `kernel.c` does the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search.bounds import ROUNDING
from raycluster.clustering.search.centroids import PreparedCentroids, QuantizedRows, quantize_rows
from raycluster.clustering.search.float32 import Search, float_search, in_tiles
from raycluster.clustering.search.rerank import nearest_in_float64
from raycluster.features.matrix import device

# Large enough to amortise calls from Python, small enough for the caches.
_TILE_ROWS = 1024
_TILE_SCORES = 1 << 20
_PANEL_SCORES = 1 << 18
GROUP = 16  # scores that are examined one by one if the highest of them reaches the floor
_VECTOR = 16
_CANDIDATES = 32  # per row; with more, float32 products of everything cost less


class Pairs(NamedTuple):
    """Rows (ascending) and centroids that may be their nearest, (p,) int64 each."""

    rows: torch.Tensor
    columns: torch.Tensor


class ScratchBuffers(threading.local):
    """Buffers that a thread reuses for every tile: allocating them anew would take a third of the time."""

    def __init__(self) -> None:
        self.whole = torch.empty(_PANEL_SCORES, dtype=torch.int32)
        self.scaled = torch.empty(_PANEL_SCORES)
        self.num_centroids = 0
        self.upper_bounds = torch.empty(0, 0)
        self.rows = np.empty((0, 0), np.float32)

    def centred(self, tile: NDArray[np.float32], centre: NDArray[np.float32]) -> NDArray[np.float32]:
        """tile - centre."""
        if len(self.rows) < len(tile) or self.rows.shape[1] != tile.shape[1]:
            self.rows = np.empty(tile.shape, np.float32)
        return np.subtract(tile, centre, out=self.rows[: len(tile)])

    def row_buffers(self, num_rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two (n, D) float32 buffers of at most _PANEL_SCORES values each; they share memory with the panel."""
        flat = self.whole.view(torch.float32), self.scaled
        return flat[0][: num_rows * dim].view(num_rows, dim), flat[1][: num_rows * dim].view(num_rows, dim)

    def score_buffer(self, num_rows: int, num_centroids: int) -> torch.Tensor:
        """(n, K padded) whose padding is -infinity."""
        if num_rows > len(self.upper_bounds) or num_centroids != self.num_centroids:
            stream = GROUP * _VECTOR
            self.upper_bounds = torch.full((num_rows, -(-num_centroids // stream) * stream), -torch.inf)
            self.num_centroids = num_centroids
        return self.upper_bounds[:num_rows]


_scratch = ScratchBuffers()


def can_search(prepared: PreparedCentroids) -> bool:
    """Whether the processor has fast 8-bit products, and the error bounds hold for these centroids."""
    fast = device().type == "cpu" and torch.cpu.get_capabilities().get("avx512_vnni", False)
    return fast and prepared.fit_int8


def int8_search(prepared: PreparedCentroids) -> tuple[Search, int]:
    """A search by 8-bit products, and its number of rows per call."""

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = torch.from_numpy(_scratch.centred(tile, prepared.centre))
        parts = [
            quantize_rows(part, _scratch.row_buffers(*part.shape))
            for part in rows.split(_PANEL_SCORES // rows.shape[1])
        ]
        return label_rows(tile, rows, QuantizedRows(*map(torch.cat, zip(*parts, strict=True))), prepared, _candidates)

    return search, min(_TILE_ROWS, max(64, _TILE_SCORES // len(prepared.centroids)))


def label_rows(
    tile: NDArray[np.float32],
    rows: torch.Tensor,
    quantized: QuantizedRows,
    prepared: PreparedCentroids,
    propose: Callable[[torch.Tensor, QuantizedRows, PreparedCentroids], Pairs | None],
) -> NDArray[np.int64]:
    """Labels (n,) of a tile, decided among the candidates of its rows, or among all centroids if `propose` gives None.

    rows: tile - prepared.centre, on the device of `propose`.
    """
    pairs = None
    if bool((quantized.norms < 2.0**50).all()):  # else squares might overflow float32; false for NaN
        pairs = propose(rows, quantized, prepared)
    return in_tiles(tile, *float_search(prepared)) if pairs is None else _nearest_of_pairs(tile, pairs, prepared)


def _upper_bounds(quantized: QuantizedRows, prepared: PreparedCentroids) -> torch.Tensor:
    """Upper bounds of the scores of all centroids, (n, K padded)."""
    centroids, num_rows, num_centroids = prepared.quantized, len(quantized.scales), len(prepared.offsets)
    upper_bounds, panel = _scratch.score_buffer(num_rows, num_centroids), max(1, _PANEL_SCORES // num_rows)
    # In units of a row's scale both errors are of similar size for all rows, whatever their norm.
    error, length = (
        float((size / quantized.scales).max()) for size in (quantized.errors, quantized.norms + quantized.errors)
    )
    missing = error * centroids.norms + length * centroids.errors
    offset_bounds = prepared.offsets + centroids.norms.square() * ROUNDING
    for start in range(0, num_centroids, panel):
        part = slice(start, min(start + panel, num_centroids))
        shape = num_rows, part.stop - start
        whole, scaled = (flat[: shape[0] * shape[1]].view(shape) for flat in (_scratch.whole, _scratch.scaled))
        torch._int_mm(quantized.values, centroids.values[part].T, out=whole)
        torch.addcmul(missing[part], scaled.copy_(whole), centroids.scales[part], out=scaled)
        torch.addcmul(offset_bounds[part], scaled, quantized.scales[:, None], out=upper_bounds[:, part])
    return upper_bounds


def _candidates(rows: torch.Tensor, quantized: QuantizedRows, prepared: PreparedCentroids) -> Pairs | None:
    """The centroids that may be nearest by their float32 scores; None if there are too many."""
    upper_bounds, error_bound = _upper_bounds(quantized, prepared), prepared.score_error(quantized.norms)
    groups, all_rows = upper_bounds.shape[1] // GROUP, torch.arange(len(rows))
    highest = upper_bounds.view(len(rows), GROUP, groups).amax(dim=1)
    group = highest.argmax(dim=1)
    likely = Pairs(all_rows, _members(upper_bounds, all_rows, group).argmax(dim=1) * groups + group)
    floor = _scores(rows, likely, prepared) - 2.5 * error_bound
    row_ids, group_ids = torch.nonzero(highest >= floor[:, None], as_tuple=True)
    pair_ids, member = torch.nonzero(_members(upper_bounds, row_ids, group_ids) >= floor[row_ids, None], as_tuple=True)
    pairs = Pairs(row_ids[pair_ids], member * groups + group_ids[pair_ids])
    if len(pair_ids) > _CANDIDATES * len(rows):
        return None
    scores = _scores(rows, pairs, prepared)
    best = torch.full((len(rows),), -torch.inf).scatter_reduce_(0, pairs.rows, scores, "amax")
    close = scores >= (best - error_bound)[pairs.rows]
    return Pairs(pairs.rows[close], pairs.columns[close])


def _nearest_of_pairs(tile: NDArray[np.float32], pairs: Pairs, prepared: PreparedCentroids) -> NDArray[np.int64]:
    """The one centroid of each row, by float64 distances where there are several."""
    rows, columns = pairs.rows.cpu().numpy(), pairs.columns.cpu().numpy()
    labels = np.empty(len(tile), np.int64)
    labels[rows] = columns
    several = (np.bincount(rows) > 1)[rows]
    if several.any():
        rows, columns = rows[several], columns[several]
        labels[np.unique(rows)] = nearest_in_float64(tile, rows, columns, prepared.centroids)
    return labels


def _members(upper_bounds: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The scores of some groups, (n, GROUP)."""
    first = rows * upper_bounds.shape[1] + groups
    return upper_bounds.view(-1).take(
        first[:, None] + torch.arange(0, upper_bounds.shape[1], upper_bounds.shape[1] // GROUP)
    )


def _scores(rows: torch.Tensor, pairs: Pairs, prepared: PreparedCentroids) -> torch.Tensor:
    """Scores of pairs in float32."""
    centroids, centre, dim = torch.from_numpy(prepared.centroids), torch.from_numpy(prepared.centre), rows.shape[1]
    size, products = max(1, _PANEL_SCORES // dim), []
    for some_rows, columns in zip(pairs.rows.split(size), pairs.columns.split(size), strict=True):
        left, right = _scratch.row_buffers(len(some_rows), dim)
        torch.index_select(centroids, 0, columns, out=left).sub_(centre)
        products.append(left.mul_(torch.index_select(rows, 0, some_rows, out=right)).sum(dim=1))
    return torch.cat(products) + prepared.offsets[pairs.columns]
