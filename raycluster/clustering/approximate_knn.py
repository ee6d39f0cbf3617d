"""Approximate k nearest neighbours by inverted lists (Jegou, Douze and Schmid, Product quantization for nearest
neighbor search, PAMI 2011, section IV), deterministic for any blocks.

Rows are divided into the lists of k-means centroids. A row is compared with the rows of the lists whose centroids are
nearest to it. The distances to these are exact; what lies in other lists is missed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.kmeans.init import digest_rows
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.knn_graph import check_neighbours, neighbours, search_block, sorted_samples
from raycluster.clustering.search.centroids import prepare
from raycluster.clustering.search.nearest_rows import Database, Found
from raycluster.features.matrix import device, feature_stats, gather, rows_by_label
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

Search = Literal["exact", "approximate"]
Job = tuple[NDArray[np.int64], NDArray[np.int64], int, NDArray[np.float64]]
"""Arguments of `_search_list`: sample ids of a list and of the rows to search in it (queries), k, limits of these."""
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Sample ids of queries and of rows near them, and squared distances, (p,) each."""

_NUM_PROBES = 8
_ROWS_PER_LIST = 64  # of the sample that k-means divides
_STEPS = 5
_TILE_ROWS = 256


class _Grid(NamedTuple):
    """Centroids in integers small enough for exact products in float64. Rows become rint((x - centre) / step).

    centroids: (L, D). offsets: (L,) their squared lengths.
    """

    centre: NDArray[np.float64]
    step: float
    centroids: NDArray[np.float64]
    offsets: NDArray[np.float64]


def find_neighbours(
    features: Features,
    k: int,
    *,
    search: Search = "exact",
    num_lists: int | None = None,
    num_probes: int | None = None,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest neighbours by either search, as `neighbours` returns them; see `raycluster.knn`."""
    if search not in get_args(Search):
        raise UserError(f"search must be one of {', '.join(get_args(Search))}; seen {search!r}")
    if search == "approximate":
        return approximate_neighbours(features, k, num_lists=num_lists, num_probes=num_probes, seed=seed)
    if num_lists is not None or num_probes is not None:
        raise UserError("num_lists and num_probes have no effect on an exact search; pass search='approximate'")
    return neighbours(features, k)


def approximate_neighbours(
    features: Features, k: int, *, num_lists: int | None = None, num_probes: int | None = None, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `neighbours`, among the rows of the lists nearest to each row; equal to it where all lists are searched.

    num_lists: of k-means on a sample of the rows, None for sqrt(N). num_probes: lists that are searched for a row, None
    for 8; more where so many could hold too few rows. seed: of the sample. The process that calls holds 4 num_probes
    bytes per row besides the result.
    """
    if any(number is not None and number < 1 for number in (num_lists, num_probes)):
        raise UserError(f"num_lists and num_probes must be at least 1; seen {num_lists} and {num_probes}")
    check_neighbours(features, k)
    samples, order = sorted_samples(features)
    grid = _fit_lists(features, samples, num_lists or round(len(samples) ** 0.5), seed)
    lists = _nearest_lists(features, order, grid, num_probes or _NUM_PROBES, k)
    members = rows_by_label(lists[:, 0], len(grid.offsets))
    limits = np.empty(len(samples))
    limits[np.concatenate(members)] = np.concatenate(features.map_jobs(_limits, [(samples[one], k) for one in members]))
    found = features.map_jobs(_search_list, _jobs(samples, members, lists, limits, k))
    ids, distances = _nearest(samples, found, k)
    return ids, distances.astype(np.float32)


def _fit_lists(features: Features, samples: NDArray[np.int64], num_lists: int, seed: int) -> _Grid:
    """The lists of k-means on a sample; fewer where it has fewer distinct rows."""
    rng, size = generator(seed, "knn lists"), min(len(samples), _ROWS_PER_LIST * num_lists)
    chosen = np.sort(rng.choice(samples, size, replace=False))
    sample = gather(features, chosen)
    num_lists = min(num_lists, len({*map(bytes, np.concatenate(sample.collect(_digests)))}))
    found = kmeans(sample, num_lists, iterations=_STEPS, seed=seed)
    stats = feature_stats(features)
    low, high = stats.low.astype(np.float64), stats.high.astype(np.float64)
    # Scores are below 3 D 4^(bits - 1), and are multiplied by the number of lists.
    bits = (52 - features.dim.bit_length() - num_lists.bit_length()) // 2
    step = float((high - low).max()) / 2.0**bits or 1.0
    centroids = np.rint((found.centroids - (low + high) / 2) / step)
    return _Grid((low + high) / 2, step, centroids, np.square(centroids).sum(axis=1))


def _digests(block: Block) -> NDArray[np.bytes_]:
    return digest_rows(block.values)


def _nearest_lists(
    features: Features, order: NDArray[np.intp], grid: _Grid, num_probes: int, k: int
) -> NDArray[np.int32]:
    """(N, p) the lists nearest to each row, its own first; enough of them to hold more than k rows."""
    while True:
        num_probes = min(num_probes, len(grid.offsets))
        lists = np.concatenate(features.collect(_nearest_lists_of_block, grid, num_probes))[order]
        smallest = np.cumsum(np.sort(np.bincount(lists[:, 0], minlength=len(grid.offsets))))
        needed = int(np.searchsorted(smallest, k + 1)) + 1
        if needed <= num_probes:
            return lists
        num_probes = needed


def _nearest_lists_of_block(block: Block, grid: _Grid, num_probes: int) -> NDArray[np.int32]:
    """(n, num_probes), of equal distances the lowest list first; exact for the rounded rows."""
    rows = torch.from_numpy(np.rint((block.values - grid.centre) / grid.step)).to(device())
    centroids, offsets = (torch.tensor(array, device=device()) for array in (grid.centroids, grid.offsets))
    scores = torch.addmm(offsets, rows, centroids.T, beta=-1, alpha=2)
    distinct = scores.mul_(len(offsets)).sub_(torch.arange(len(offsets), device=device()))
    return distinct.topk(num_probes, dim=1).indices.to(torch.int32).cpu().numpy()


def _limits(features: Features, members: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """(m,) squared distances within which each member of a list has k others of it, infinite in smaller lists."""
    if len(members) <= k:
        return np.full(len(members), np.inf)
    rows = torch.from_numpy(features.rows(members)).to(device(), torch.float64)
    rows -= rows.mean(0)
    squares = rows.square().sum(1)
    limits = squares + (squares + squares.max()) * ((rows.shape[1] + 8) * 2.0**-50)  # more than the rounding errors
    for tile, part in zip(rows.split(_TILE_ROWS), limits.split(_TILE_ROWS), strict=True):
        distances = torch.addmm(squares, tile, rows.T, alpha=-2)
        # One more than k, because one of them is the row itself.
        part += distances.topk(k + 1, dim=1, largest=False).values[:, -1]
    return limits.cpu().numpy()


def _jobs(
    samples: NDArray[np.int64],
    members: list[NDArray[np.intp]],
    lists: NDArray[np.int32],
    limits: NDArray[np.float64],
    k: int,
) -> list[Job]:
    """One per list that is searched. members: rows of each list. lists: (N, p) those to search for each row."""
    queries = [places // lists.shape[1] for places in rows_by_label(lists.ravel(), len(members))]
    return [
        (samples[rows], samples[asking], k, limits[asking])
        for rows, asking in zip(members, queries, strict=True)
        if len(rows) and len(asking)
    ]


def _search_list(
    features: Features, members: NDArray[np.int64], queries: NDArray[np.int64], k: int, limits: NDArray[np.float64]
) -> Pairs:
    """The k nearest members of each query, except those beyond its limit."""
    database = Database(prepare(features.rows(members)), members)
    found = gather(features, queries).collect(search_block, database, k, queries, limits)
    ids, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    rows, columns = np.nonzero((ids >= 0) & (distances <= limits[:, None]))
    return queries[rows], ids[rows, columns], distances[rows, columns]


def _nearest(samples: NDArray[np.int64], pairs: list[Pairs], k: int) -> Found:
    """The k nearest (N, k) of all pairs, which hold at least k for each row."""
    queries, ids, distances = (np.concatenate(column) for column in zip(*pairs, strict=True))
    rows = np.searchsorted(samples, queries)
    order = np.lexsort((ids, distances, rows))
    starts = np.searchsorted(rows[order], np.arange(len(samples)))
    nearest = order[starts[:, None] + np.arange(k)]
    return ids[nearest], distances[nearest]
