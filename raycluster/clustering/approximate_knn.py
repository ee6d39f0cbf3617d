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
from raycluster.features.matrix import LocalFeatures, device, feature_stats
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

Search = Literal["exact", "approximate"]
Job = tuple[NDArray[np.int64], NDArray[np.int64], int, NDArray[np.float64]]
"""Arguments of `_search_list`: sample ids of a list and of the rows to search in it (queries), k, limits of these."""
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Sample ids of queries and of rows near them, and squared distances, (p,) each."""

_NUM_PROBES = 16
_ROWS_PER_LIST = 64  # of the sample that k-means divides
_STEPS = 5
_BLOCK_ROWS = 1 << 11


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
    for 16; more where so many could hold too few rows. seed: of the sample. The process that calls holds 4 num_probes
    bytes per row besides the result.
    """
    if any(number is not None and number < 1 for number in (num_lists, num_probes)):
        raise UserError(f"num_lists and num_probes must be at least 1; seen {num_lists} and {num_probes}")
    check_neighbours(features, k)
    samples, order = sorted_samples(features)
    grid = _fit_lists(features, samples, num_lists or round(len(samples) ** 0.5), seed)
    lists = _nearest_lists(features, order, grid, num_probes or _NUM_PROBES, k)
    found = np.full((len(samples), k), -1), np.full((len(samples), k), np.inf)
    for probes in (slice(0, 1), slice(1, None)):  # what is found in the nearest list limits the search of the others
        jobs = _jobs(samples, lists[:, 0], lists[:, probes], found[1][:, -1], k)
        if jobs:
            found = _merge(samples, found, features.map_jobs(_search_list, jobs))
    return found[0], found[1].astype(np.float32)


def _fit_lists(features: Features, samples: NDArray[np.int64], num_lists: int, seed: int) -> _Grid:
    """The lists of k-means on a sample; fewer where it has fewer distinct rows."""
    rng, size = generator(seed, "knn lists"), min(len(samples), _ROWS_PER_LIST * num_lists)
    chosen = np.sort(rng.choice(samples, size, replace=False))
    values = features.rows(chosen)
    num_lists = min(num_lists, len({*map(bytes, digest_rows(values))}))
    found = kmeans(LocalFeatures(_blocks(chosen, values)), num_lists, iterations=_STEPS, seed=seed)
    stats = feature_stats(features)
    low, high = stats.low.astype(np.float64), stats.high.astype(np.float64)
    # Scores are below 3 D 4^(bits - 1), and are multiplied by the number of lists.
    bits = (52 - features.dim.bit_length() - num_lists.bit_length()) // 2
    step = float((high - low).max()) / 2.0**bits or 1.0
    centroids = np.rint((found.centroids - (low + high) / 2) / step)
    return _Grid((low + high) / 2, step, centroids, np.square(centroids).sum(axis=1))


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


def _jobs(
    samples: NDArray[np.int64], own: NDArray[np.int32], lists: NDArray[np.int32], limits: NDArray[np.float64], k: int
) -> list[Job]:
    """One per list that is probed. own: (N,) the list of each row. lists: (N, p) those to search for it."""
    num_lists = int(max(own.max(), lists.max(initial=0))) + 1
    members = _split(own, num_lists)
    queries = [places // lists.shape[1] for places in _split(lists.ravel(), num_lists)]
    probed = [number for number in range(num_lists) if len(members[number]) and len(queries[number])]
    return [(samples[members[number]], samples[queries[number]], k, limits[queries[number]]) for number in probed]


def _split(numbers: NDArray[np.int32], count: int) -> list[NDArray[np.intp]]:
    """For each number below count where it stands, ascending."""
    return np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers, minlength=count))[:-1])


def _search_list(
    features: Features, members: NDArray[np.int64], queries: NDArray[np.int64], k: int, limits: NDArray[np.float64]
) -> Pairs:
    """The k nearest members of each query, except those beyond its limit."""
    blocks = LocalFeatures(_blocks(queries, features.rows(queries)))
    found = blocks.collect(search_block, Database(prepare(features.rows(members)), members), k, queries, limits)
    ids, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    rows, columns = np.nonzero((ids >= 0) & (distances <= limits[:, None]))
    return queries[rows], ids[rows, columns], distances[rows, columns]


def _merge(samples: NDArray[np.int64], found: Found, pairs: list[Pairs]) -> Found:
    """The k nearest of what is known (N, k) and of further pairs."""
    queries, ids, distances = (np.concatenate(column) for column in zip(*pairs, strict=True))
    num_rows, k = found[0].shape
    rows = np.concatenate([np.repeat(np.arange(num_rows), k), np.searchsorted(samples, queries)])
    ids, distances = np.concatenate([found[0].ravel(), ids]), np.concatenate([found[1].ravel(), distances])
    order = np.lexsort((ids, distances, rows))
    starts = np.searchsorted(rows[order], np.arange(num_rows))
    nearest = order[starts[:, None] + np.arange(k)]
    return ids[nearest], distances[nearest]


def _blocks(samples: NDArray[np.int64], values: NDArray[np.float32]) -> list[Block]:
    cuts = range(0, len(samples), _BLOCK_ROWS)
    return [Block(samples[cut : cut + _BLOCK_ROWS], values[cut : cut + _BLOCK_ROWS]) for cut in cuts]
