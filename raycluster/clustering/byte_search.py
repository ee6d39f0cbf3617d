"""The search of engine="torch" on processors that multiply bytes fast (VNNI): several times a float32 product.

A row x and a centroid c (both about the centroids' mean) are rounded to 8 bits, x = X + dx and c = C + dc. Then
|x.c - X.C| <= |dx| |c| + |X| |dc| (Cauchy-Schwarz), where all four norms are known: every score x.c - |c|^2 / 2 has an
upper end. The float32 score of the centroid whose upper end is highest bounds the best from below, and what cannot
reach it is out. The few that remain are computed in float32, near-ties of these in float64. `kernel.c` does the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.decision import decide, product_error
from raycluster.clustering.searches import Search, float_search
from raycluster.clustering.target import Rounded, Target, round_rows
from raycluster.features import device

_ROWS = 2048
_TILE_ROWS = 256
_TILE_SCORES = 1 << 20
_PANEL = 1024  # centroids whose products stay in the second-level cache
_GROUP = 16  # scores that are looked at one by one if the highest of them comes into question
_VECTOR = 16
_CANDIDATES = 32  # per row; with more, float32 products of everything cost less
_REACH = (2.0**-40, 2.0**40)
_LARGEST_DIM = 1 << 15
_ROUNDING = 2.0**-19


class _Pairs(NamedTuple):
    """Rows (ascending) and centroids that may be their nearest, (p,) int64 each."""

    rows: torch.Tensor
    columns: torch.Tensor


def can_search(target: Target) -> bool:
    """Whether the processor multiplies bytes fast, and the error bounds hold for these centroids."""
    fast = device().type == "cpu" and torch.cpu.get_capabilities().get("avx512_vnni", False)
    return fast and _REACH[0] < target.reach < _REACH[1] and len(target.centre) <= _LARGEST_DIM


def byte_search(target: Target) -> tuple[Search, int]:
    """A search by products of bytes, and the number of rows it wants at a time."""
    num_centroids, lane = len(target.centroids), _GROUP * _VECTOR
    size = min(_TILE_ROWS, max(64, _TILE_SCORES // num_centroids))
    tops = torch.full((size, -(-num_centroids // lane) * lane), -torch.inf)

    def search(tile: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = torch.from_numpy(tile - target.centre)
        # Rows of like length share the terms of the bound; squares of the longest (or NaN) would leave float32.
        norms, order = torch.linalg.vector_norm(rows, dim=1).sort()
        rows, usual = rows.index_select(0, order), int((norms < 2.0**50).sum())
        rounded, labels, places = round_rows(rows), np.empty(len(tile), np.int64), order.numpy()
        for start in range(0, usual, size):
            part = slice(start, min(start + size, usual))
            few = Rounded(*(field[part] for field in rounded))
            _upper_ends(few, target, tops[: part.stop - start])
            pairs = _candidates(rows[part], few, target, tops[: part.stop - start])
            if pairs is None:
                return float_search(target)[0](tile)
            labels[places[part]] = _settle(tile, places[part], pairs, target)
        if usual < len(tile):
            labels[places[usual:]] = float_search(target)[0](tile[places[usual:]])
        return labels

    return search, _ROWS


def _upper_ends(rounded: Rounded, target: Target, tops: torch.Tensor) -> None:
    """Write the upper ends of the scores of all centroids to tops (n, K padded)."""
    centroids = target.rounded
    length = float((rounded.norms + rounded.errors).max())
    ends = target.offsets + centroids.norms.square() * _ROUNDING
    ends += float(rounded.errors.max()) * centroids.norms + length * centroids.errors
    for start in range(0, len(ends), _PANEL):
        part = slice(start, start + _PANEL)
        scaled = torch._int_mm(rounded.values, centroids.values[part].T).float().mul_(centroids.scales[part])
        torch.addcmul(ends[part], scaled, rounded.scales[:, None], out=tops[:, start : start + scaled.shape[1]])


def _candidates(rows: torch.Tensor, rounded: Rounded, target: Target, tops: torch.Tensor) -> _Pairs | None:
    """The centroids that may be nearest by their float32 scores; None if they are very many. tops: (n, K padded)."""
    groups, everyone = tops.shape[1] // _GROUP, torch.arange(len(rows))
    slack = product_error(rows.shape[1]) * target.reach * (rounded.norms + target.reach / 2)
    highest = tops.view(len(rows), _GROUP, groups).amax(dim=1)
    group = highest.argmax(dim=1)
    likely = _Pairs(everyone, _members(tops, everyone, group).argmax(dim=1) * groups + group)
    floor = _scores(rows, likely, target) - 2.5 * slack
    places, found = torch.nonzero(highest >= floor[:, None], as_tuple=True)
    which, member = torch.nonzero(_members(tops, places, found) >= floor[places, None], as_tuple=True)
    pairs = _Pairs(places[which], member * groups + found[which])
    if len(which) > _CANDIDATES * len(rows):
        return None
    scores = _scores(rows, pairs, target)
    best = torch.full((len(rows),), -torch.inf).scatter_reduce_(0, pairs.rows, scores, "amax")
    close = scores >= (best - slack)[pairs.rows]
    return _Pairs(pairs.rows[close], pairs.columns[close])


def _settle(tile: NDArray[np.float32], places: NDArray[np.int64], pairs: _Pairs, target: Target) -> NDArray[np.int64]:
    """The one centroid of each row, by float64 distances where there are several. places: of the rows in the tile."""
    rows, columns = pairs.rows.numpy(), pairs.columns.numpy()
    labels = np.empty(len(places), np.int64)
    labels[rows] = columns
    several = (np.bincount(rows) > 1)[rows]
    if several.any():
        rows, columns = rows[several], columns[several]
        labels[np.unique(rows)] = decide(tile[places], rows, columns, target.centroids)
    return labels


def _members(tops: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The scores of some groups, (n, _GROUP)."""
    width = tops.shape[1] // _GROUP
    first = rows * tops.shape[1] + groups
    return tops.view(-1).take(first[:, None] + torch.arange(0, tops.shape[1], width))


def _scores(rows: torch.Tensor, pairs: _Pairs, target: Target) -> torch.Tensor:
    """Scores of pairs in float32."""
    products = rows.index_select(0, pairs.rows).mul_(target.centred.index_select(0, pairs.columns))
    return products.sum(dim=1) + target.offsets[pairs.columns]
