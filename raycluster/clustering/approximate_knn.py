"""Approximate k nearest neighbours by inverted lists (Jegou, Douze and Schmid, Product quantization for nearest
neighbor search, PAMI 2011, section IV), deterministic for any blocks.

Rows are divided into the lists of k-means centroids. A row is compared with the rows of its own list, then with those
of the lists whose centroids are nearest to it, except where these must be farther than the neighbours found in its own.
The distances to these are exact; what lies in other lists is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.kmeans.init import digest_rows
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.knn_graph import check_neighbours, neighbours, sorted_samples
from raycluster.clustering.search.centroids import PreparedCentroids, prepare
from raycluster.clustering.search.nearest_rows import NONE, Database, Found, Queries, improve, unknown
from raycluster.clustering.search.rerank import pair_distances
from raycluster.features.matrix import gather, rows_by_label, thread_map
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

Search = Literal["exact", "approximate"]

_NUM_PROBES = 8
_ROWS_PER_LIST = 16  # of the sample that k-means divides
_STEPS = 3
_JOB_ROWS = 1 << 14  # of a list, and that a job reads at a time
_THREAD_ROWS = 1 << 12
_TILE_LISTS = 256
_ABOVE_ROUNDING = 1 + 2.0**-20
_FAR = 1e150  # instead of infinity, times which 0 is no number


class Lists(NamedTuple):
    """Inverted lists. reaches: (L,) distance of each centroid to the farthest other. num_probes: searched for a row."""

    centroids: PreparedCentroids
    reaches: NDArray[np.float64]
    num_probes: int


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

    num_lists: of k-means on a sample of the rows, None for sqrt(8 N). num_probes: lists that are searched for a row,
    None for 8; more where so many could hold too few rows. seed: of the sample. The process that calls holds 4
    num_probes bytes per row besides the result.
    """
    if any(number is not None and number < 1 for number in (num_lists, num_probes)):
        raise UserError(f"num_lists and num_probes must be at least 1; seen {num_lists} and {num_probes}")
    check_neighbours(features, k)
    samples, order = sorted_samples(features)
    # Then a row is compared with about as many centroids, twice, as rows.
    centroids = _fit_lists(features, samples, num_lists or round((_NUM_PROBES * len(samples)) ** 0.5), seed)
    labels, gaps = (column[order] for column in _joined(features.collect(_nearest_list, prepare(centroids))))
    members, owners = _bounded(rows_by_label(labels, len(centroids)))
    num_probes = _enough(num_probes or _NUM_PROBES, len(centroids), members, k)
    lists = Lists(prepare(centroids[owners]), _reaches(centroids)[owners], num_probes)
    by_list = np.concatenate(members)
    ids, distances, probes = _joined(features.map_jobs(_search_own, _own_jobs(samples, members, gaps, lists, k)))
    left = np.flatnonzero((probes >= 0).any(axis=1))
    if len(left):
        jobs = [
            (samples[by_list[rows]], (ids[rows], distances[rows]), *_probed(probes[rows], samples, members))
            for rows in np.split(left, range(_JOB_ROWS, len(left), _JOB_ROWS))
        ]
        ids[left], distances[left] = _joined(features.map_jobs(_search_others, jobs))
    back = np.argsort(by_list)
    return ids[back], distances[back].astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- the lists


def _fit_lists(features: Features, samples: NDArray[np.int64], num_lists: int, seed: int) -> NDArray[np.float32]:
    """(L, D) centroids of k-means on a sample; fewer than asked for where it has fewer distinct rows."""
    rng, size = generator(seed, "knn lists"), min(len(samples), _ROWS_PER_LIST * num_lists)
    sample = gather(features, np.sort(rng.choice(samples, size, replace=False)))
    num_lists = min(num_lists, len({*map(bytes, np.concatenate(sample.collect(_digests)))}))
    return kmeans(sample, num_lists, iterations=_STEPS, seed=seed).centroids


def _digests(block: Block) -> NDArray[np.bytes_]:
    return digest_rows(block.values)


def _nearest_list(block: Block, centroids: PreparedCentroids) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(n,) the list of each row, and its squared distance to the centroid."""
    found = _nearest_lists(block.values, 1, np.full(len(block.samples), np.inf), centroids)
    return found[0][:, 0], found[1][:, 0]


def _nearest_lists(
    values: NDArray[np.floating], number: int, limits: NDArray[np.float64], centroids: PreparedCentroids
) -> Found:
    queries = unknown(values, np.full(len(values), -1), number, limits)
    improve(queries, Database(centroids, np.arange(len(centroids.centroids))))
    return queries.found


def _bounded(places: list[NDArray[np.intp]]) -> tuple[list[NDArray[np.intp]], list[int]]:
    """Lists cut where they are too long for a job, and of which list each part is."""
    cut = [np.split(rows, range(_JOB_ROWS, len(rows), _JOB_ROWS)) for rows in places]
    return [part for parts in cut for part in parts], [number for number, parts in enumerate(cut) for _ in parts]


def _enough(num_probes: int, num_lists: int, members: list[NDArray[np.intp]], k: int) -> int:
    """How many lists to search, more where so few could hold k rows or fewer; all for all, however these are cut."""
    smallest = np.cumsum(np.sort([len(rows) for rows in members]))
    needed = int(np.searchsorted(smallest, k + 1)) + 1
    return len(members) if num_probes >= num_lists else min(max(num_probes, needed), len(members))


def _reaches(centroids: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = centroids - centroids.mean(axis=0, dtype=np.float64)
    squares, tiles = np.square(rows).sum(axis=1), range(0, len(rows), _TILE_LISTS)
    nearness = [(2 * rows[start : start + _TILE_LISTS] @ rows.T - squares).min(axis=1) for start in tiles]
    return np.sqrt((squares - np.concatenate(nearness)).clip(min=0))


# --------------------------------------------------------------------------------------------------- the own list


def _own_jobs(
    samples: NDArray[np.int64],
    members: list[NDArray[np.intp]],
    gaps: NDArray[np.float64],
    lists: Lists,
    k: int,
) -> list[tuple[int, list[NDArray[np.int64]], NDArray[np.float64], Lists, int]]:
    """Arguments of `_search_own` for all lists. gaps: (N,) squared distances to the centroids."""
    groups = [(group[0], [members[number] for number in group]) for group in _groups([len(rows) for rows in members])]
    return [
        (first, [samples[rows] for rows in parts], gaps[np.concatenate(parts)], lists, k) for first, parts in groups
    ]


def _groups(sizes: list[int]) -> list[list[int]]:
    """Consecutive numbers in groups whose sizes add up to what a job reads at a time."""
    groups: list[list[int]] = [[]]
    total = 0
    for number, size in enumerate(sizes):
        if total + size > _JOB_ROWS:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += size
    return groups


def _joined(parts: Sequence[tuple[NDArray[Any], ...]]) -> list[NDArray[Any]]:
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _search_own(
    features: Features, first: int, members: list[NDArray[np.int64]], gaps: NDArray[np.float64], lists: Lists, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]:
    """What is nearest in the list of each row, and the lists (n, num_probes) to search next, -1 for none.

    members: of consecutive lists. first: number of their first. gaps: of these rows.
    """
    samples, sizes = np.concatenate(members), [len(rows) for rows in members]
    queries, labels = unknown(features.rows(samples), samples, k), np.repeat(np.arange(len(sizes)), sizes) + first
    thread_map(partial(_search_within, queries), np.split(np.arange(len(samples)), np.cumsum(sizes)[:-1]))
    parts = [slice(start, start + _THREAD_ROWS) for start in range(0, len(samples), _THREAD_ROWS)]
    probes = thread_map(
        lambda part: _next_lists(queries.values[part], labels[part], gaps[part], queries.farthest[part], lists), parts
    )
    return *queries.found, np.concatenate(probes)


def _search_within(queries: Queries, places: NDArray[np.intp]) -> None:
    """Compare consecutive rows with each other."""
    if len(places):
        part = slice(places[0], places[-1] + 1)
        improve(queries, Database(prepare(queries.values[part]), queries.samples[part]), places)


def _next_lists(
    values: NDArray[np.float32],
    labels: NDArray[np.int64],
    gaps: NDArray[np.float64],
    farthest: NDArray[np.float64],
    lists: Lists,
) -> NDArray[np.int32]:
    """(n, num_probes) the lists nearest to rows, -1 for their own and for those that hold nothing nearer than found.

    Let a row x be in the list of centroid a, and y in that of b within r of x. Then x is within r of the plane between
    a and b, beyond which y is, hence |x - b|^2 <= |x - a|^2 + 2 r |a - b|.
    """
    if lists.num_probes == 1:
        return np.full((len(values), 1), -1, np.int32)
    reach = np.minimum(2 * np.sqrt(farthest), _FAR)
    limits = (gaps + reach * lists.reaches[labels]) * _ABOVE_ROUNDING
    found, distances = _nearest_lists(values, lists.num_probes, limits, lists.centroids)
    rows, columns = np.nonzero((found != NONE) & (found != labels[:, None]))
    centroids, ids = lists.centroids.centroids, found[rows, columns]
    pairs, inverse = np.unique(labels[rows] * len(centroids) + ids, return_inverse=True)
    apart = np.sqrt(pair_distances(centroids, pairs // len(centroids), centroids, pairs % len(centroids)))[inverse]
    near = distances[rows, columns] <= (gaps[rows] + reach[rows] * apart) * _ABOVE_ROUNDING
    probes = np.full(found.shape, -1, np.int32)
    probes[rows[near], columns[near]] = ids[near]
    return probes


# -------------------------------------------------------------------------------------------------- further lists


def _probed(
    probes: NDArray[np.int32], samples: NDArray[np.int64], members: list[NDArray[np.intp]]
) -> tuple[NDArray[np.intp], list[NDArray[np.int64]]]:
    """Probes (n, p) renumbered to count only the lists that occur, and the members of these; -1 stays."""
    numbers, renumbered = np.unique(probes, return_inverse=True)
    absent = int(numbers[0] < 0)
    return renumbered.reshape(probes.shape) - absent, [samples[members[number]] for number in numbers[absent:]]


def _search_others(
    features: Features,
    samples: NDArray[np.int64],
    found: Found,
    probes: NDArray[np.intp],
    members: list[NDArray[np.int64]],
) -> Found:
    """What is nearest in the lists that are probed, (n, p), or was found before."""
    queries = Queries(features.rows(samples), samples, (found[0].copy(), found[1].copy()))
    asking = [places // probes.shape[1] for places in rows_by_label(probes.ravel() + 1, len(members) + 1)[1:]]
    bounds = [(start, start + _THREAD_ROWS) for start in range(0, len(samples), _THREAD_ROWS)]
    for group in _groups([len(rows) for rows in members]):
        ids = [members[number] for number in group]
        values = np.split(features.rows(np.concatenate(ids)), np.cumsum([len(rows) for rows in ids])[:-1])
        databases = thread_map(_database, list(zip(values, ids, strict=True)))
        searched = list(zip(databases, [asking[number] for number in group], strict=True))
        thread_map(partial(_search_some, queries, searched), bounds)
    return queries.found


def _database(rows: tuple[NDArray[np.float32], NDArray[np.int64]]) -> Database:
    database = Database(prepare(rows[0]), rows[1])
    _ = database.rows.packed  # before threads share it
    return database


def _search_some(queries: Queries, searched: list[tuple[Database, NDArray[np.intp]]], bounds: tuple[int, int]) -> None:
    """Compare the queries between two bounds with those databases that they ask for."""
    for database, asking in searched:
        first, last = np.searchsorted(asking, bounds)
        if first < last:
            improve(queries, database, asking[first:last])
