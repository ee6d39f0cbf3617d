"""Initial centroids: distinct random rows, scalable k-means++, given centroids, or the means of given labels."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.fixed_point import (
    PendingRows,
    Sums,
    inertia_scale,
    means,
    merge,
    parts,
    select,
    spans,
    sum_scale,
    total,
)
from raycluster.clustering.search import int8_cpu
from raycluster.clustering.search.assign import Engine, assign
from raycluster.clustering.search.centroids import PreparedCentroids, prepare
from raycluster.clustering.search.rerank import squared_distances
from raycluster.features.matrix import FeatureStats, LocalFeatures
from raycluster.seeding import generator, seed_for
from raycluster.types import Block, Features, UserError

Init: TypeAlias = "Literal['random', 'k-means++'] | NDArray[np.floating] | NDArray[np.integer]"

_SPLIT = 1 / 1024
_ROUNDS = 4
_ROWS = 256
_SPLITMIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def check_init(init: object) -> None:
    """Raise UserError for an unknown name; the rest can only be checked against the rows."""
    if isinstance(init, str) and init not in ("random", "k-means++"):
        raise UserError(f"init must be 'random', 'k-means++', centroids or labels; seen {init!r}")


def initialize(
    features: Features, num_clusters: int, init: Init, *, stats: FeatureStats, seed: int, engine: Engine
) -> tuple[NDArray[np.float32], int]:
    """The initial centroids (K, D), and how many of them were split off others."""
    check_init(init)
    if isinstance(init, str):
        rows = random_rows(features, num_clusters, seed)
        return (_scalable(features, rows, stats, seed, engine) if init == "k-means++" else rows), 0
    given = np.asarray(init)
    if given.ndim == 2 and np.issubdtype(given.dtype, np.floating):
        if given.shape != (num_clusters, features.dim) or not np.isfinite(given).all():
            raise UserError(
                f"init must be finite centroids of shape ({num_clusters}, {features.dim}); seen {given.shape} with "
                f"{int((~np.isfinite(given)).sum())} values that are not finite"
            )
        return given.astype(np.float32), 0  # a copy: k-means modifies it
    is_labels = given.ndim == 1 and np.issubdtype(given.dtype, np.integer)
    if not is_labels or given.max(initial=0) >= num_clusters:
        raise UserError(
            f"init must be 'random', 'k-means++', ({num_clusters}, {features.dim}) floats, or labels below "
            f"{num_clusters} by sample id; seen {given.dtype} of shape {given.shape}"
            + (f", largest {given.max(initial=0)}" if is_labels else "")
        )
    centroids, sizes = np.zeros((num_clusters, features.dim), np.float32), np.empty(num_clusters, np.int64)
    scale = sum_scale(stats)
    for span in spans(num_clusters, features):
        summed: Sums = features.fold(_sum_labels, given, span, scale, combine=merge)
        totals, (sizes[span],) = total(summed)
        for part, inner in parts(span):
            centroids[part] = means(totals[inner], sizes[part], scale, centroids[part])
    if not sizes.any():
        raise UserError("init labels: none of the samples has a label >= 0; give init='random' for a fresh start")
    pairs = pick_split_clusters(sizes, generator(seed, "kmeans split", 0))
    split_centroids(centroids, pairs)
    return centroids, len(pairs)


def pick_split_clusters(sizes: NDArray[np.int64], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(empty, donor) pairs: for every empty cluster one to split, drawn in proportion to its size - 1."""
    sizes, pairs = sizes.copy(), []
    for empty in np.flatnonzero(sizes == 0).tolist():
        surplus = np.cumsum(np.maximum(sizes - 1, 0))
        if not surplus[-1]:
            break
        donor = int(np.searchsorted(surplus, rng.integers(surplus[-1]), side="right"))
        sizes[empty] = sizes[donor] // 2
        sizes[donor] -= sizes[empty]
        pairs.append((empty, donor))
    return pairs


def split_centroids(centroids: NDArray[np.float32], pairs: Sequence[tuple[int, int]]) -> None:
    """Split clusters for empty ones, in place: each half is the centroid times 1 +- 1/1024, by dimension (faiss)."""
    distance = np.where(np.arange(centroids.shape[1]) % 2 == 0, _SPLIT, -_SPLIT).astype(np.float32)
    for empty, donor in pairs:
        centroids[empty] = centroids[donor] * (1 + distance)
        centroids[donor] *= 1 - distance


def random_rows(features: Features, num_clusters: int, seed: int) -> NDArray[np.float32]:
    """The first K distinct rows in a seeded order of the sample ids; UserError if there are not so many."""
    order = np.concatenate(features.collect(_samples))
    order.sort()
    generator(seed, "kmeans init").shuffle(order)
    count = num_clusters
    while len(selected := _distinct(features, order[:count])) < num_clusters:
        if count >= len(order):
            raise UserError(too_few(features, len(selected), num_clusters))
        count *= 2
    order = order[selected[:num_clusters]]
    return features.rows(order)


def _distinct(features: Features, samples: NDArray[np.int64]) -> NDArray[np.intp]:
    """The positions, ascending, of samples whose rows do not repeat an earlier one."""
    drawn = np.sort(samples)
    found, digests = (np.concatenate(column) for column in zip(*features.collect(_digests, drawn), strict=True))
    _, first = np.unique(digests[np.argsort(found)[np.searchsorted(drawn, samples)]], return_index=True)
    return np.sort(first)


def too_few(features: Features, num_distinct: int, num_clusters: int) -> str:
    """The message for fewer distinct rows than clusters."""
    seen = f"only {num_distinct} distinct rows for num_clusters={num_clusters}"
    if isinstance(features, LocalFeatures) and features.merged_in_float32():
        return f"{seen}: rows that differ are equal in float32, in which k-means computes. Subtract their mean first"
    return (
        f"{seen}: lower num_clusters or remove duplicates; if a network computed the rows, it may have collapsed to "
        "few outputs"
    )


def _sum_labels(block: Block, table: NDArray[np.integer], span: slice, scale: float) -> Sums:
    """Sums by known labels; table is indexed by sample id, ids beyond it have no label."""
    known = block.samples < len(table)
    labels = np.full(len(block.samples), -1, np.int64)
    labels[known] = table[block.samples[known]]
    values, labels = select(block.values, labels, span)
    num_clusters = span.stop - span.start
    counts = np.bincount(labels, minlength=num_clusters)
    return PendingRows(values, labels, num_clusters, scale, int8_cpu.support() is not None, (counts,))


# ------------------------------------------------------------------------------------------------- scalable k-means++


def _scalable(
    features: Features, rows: NDArray[np.float32], stats: FeatureStats, seed: int, engine: Engine
) -> NDArray[np.float32]:
    """K rows far apart: k-means|| (Bahmani et al. 2012, algorithm 2), a few passes instead of K.

    Every pass draws about K / 2 rows in proportion to their squared distance from those drawn before; of these,
    weighted by the rows nearest to them, K are selected by k-means++. rows: K distinct ones; the first is the start,
    and all of them fill up the pool where too few were drawn.
    """
    num_clusters = len(rows)
    selected = rows[:1]
    for number in range(_ROUNDS):
        prepared, unit = prepare(selected), inertia_scale(stats, rows)
        cost = sum(features.collect(_cost, prepared, unit, engine))
        if not cost:
            break
        share = max(1.0, num_clusters / 2) / cost
        key = seed_for(seed, "kmeans||", number)
        drawn = np.sort(np.concatenate(features.collect(_draw, prepared, unit * share, key, engine)))
        selected = np.concatenate([selected, features.rows(drawn)])
    pool = np.concatenate([selected, rows])
    digests = [digest_rows(pool[start : start + _ROWS]) for start in range(0, len(pool), _ROWS)]
    _, first = np.unique(np.concatenate(digests), return_index=True)
    if len(first) < len(pool):
        pool = pool[np.sort(first)]
    weights = sum(features.collect(_counts, prepare(pool), engine))
    return _plus_plus(pool, np.asarray(weights, np.float64), num_clusters, generator(seed, "kmeans++"))


def _cost(block: Block, prepared: PreparedCentroids, unit: float, engine: Engine) -> int:
    """Sum of squared distances in integer units, independent of the order."""
    distances = squared_distances(block.values, prepared.centroids, assign(block.values, prepared, engine))
    return int(np.rint(distances * unit).astype(np.int64).sum())


def _draw(block: Block, prepared: PreparedCentroids, share: float, key: int, engine: Engine) -> NDArray[np.int64]:
    """The samples drawn, each with probability `share` times its squared distance."""
    distances = squared_distances(block.values, prepared.centroids, assign(block.values, prepared, engine))
    drawn: NDArray[np.int64] = block.samples[_uniform(block.samples, key) < share * distances]
    return drawn


def _uniform(samples: NDArray[np.int64], key: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each sample id, by splitmix64, independent of the block."""
    step, first, second = _SPLITMIX
    with np.errstate(over="ignore"):
        state = (samples.astype(np.uint64) ^ np.uint64(key)) * step + step
        state = (state ^ (state >> np.uint64(30))) * first
        state = (state ^ (state >> np.uint64(27))) * second
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _counts(block: Block, prepared: PreparedCentroids, engine: Engine) -> NDArray[np.int64]:
    return np.bincount(assign(block.values, prepared, engine), minlength=len(prepared.centroids))


def _plus_plus(
    pool: NDArray[np.float32], weights: NDArray[np.float64], num_clusters: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Weighted k-means++ (Arthur and Vassilvitskii 2007) on distinct rows."""
    nearest_squared = np.full(len(pool), np.inf)
    chances = weights
    selected: list[int] = []
    for _ in range(num_clusters):
        weights_left = (
            chances if chances.sum() > 0 else np.isin(np.arange(len(pool)), selected, invert=True).astype(np.float64)
        )
        cumulated = np.cumsum(weights_left)
        index = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        selected.append(index)
        for start in range(0, len(pool), _ROWS):
            part = slice(start, start + _ROWS)
            distance = np.subtract(pool[part], pool[index], dtype=np.float64)
            nearest_squared[part] = np.minimum(nearest_squared[part], np.square(distance, out=distance).sum(axis=1))
        chances = weights * nearest_squared
    return pool[selected]


def _samples(block: Block) -> NDArray[np.int64]:
    return block.samples


def _digests(block: Block, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """The samples (ascending) that are in this block, and digests of their rows."""
    found, digests = [block.samples[:0]], [np.empty(0, "V16")]
    for start in range(0, len(block.samples), _ROWS):
        known, values = block.samples[start : start + _ROWS], block.values[start : start + _ROWS]
        inside = samples[np.searchsorted(samples, known).clip(max=len(samples) - 1)] == known
        found.append(known[inside])
        digests.append(digest_rows(values[inside]))
    return np.concatenate(found), np.concatenate(digests)


def digest_rows(values: NDArray[np.floating]) -> NDArray[np.bytes_]:
    """16 bytes per row, equal for equal rows; adding 0 makes -0.0 and 0.0 equal."""
    rows = np.add(values, np.float32(0), dtype=np.float32)
    digests = b"".join(blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, "V16")
