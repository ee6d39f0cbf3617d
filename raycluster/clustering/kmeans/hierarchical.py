"""Hierarchical k-means: each cluster is split again, into its share of the next level's clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.kmeans.init import digest_rows, too_few
from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.features.matrix import gather, rows_by_label
from raycluster.features.selected import SelectedRows
from raycluster.seeding import seed_for
from raycluster.types import Features, UserError

Shares = Literal["rows", "equal"]

_BLOCK_ROWS = 1 << 14
_GATHERED_BYTES = 1 << 30  # of the rows of a group that is clustered on one machine

_Job: TypeAlias = "tuple[NDArray[np.int64], int, int, Mapping[str, Any]]"
_Clusters: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.float32]]"


@dataclass(frozen=True, eq=False)
class Tree:
    """Levels of clusters, coarsest first. Row i belongs to samples[i] (ascending).

    labels: per level (N,) int64. centroids: per level (K, D) float32. parents: per level (K,) int64, the cluster of the
    level parent_labels that each belongs to (zeros for the first).
    """

    samples: NDArray[np.int64]
    labels: list[NDArray[np.int64]]
    centroids: list[NDArray[np.float32]]
    parents: list[NDArray[np.int64]]


def fit_tree(
    features: Features, sizes: Sequence[int], *, seed: int, options: Mapping[str, Any], shares: Shares = "rows"
) -> Tree:
    """See `raycluster.kmeans_tree`. options: of k-means."""
    if not sizes or sizes[0] < 1 or any(later < size for size, later in pairwise(sizes)):
        raise UserError(
            f"sizes must be numbers of clusters, at least 1 and not decreasing, such as [10, 1000]; seen {list(sizes)}"
        )
    if shares not in get_args(Shares):
        raise UserError(f"shares must be one of {', '.join(get_args(Shares))}; seen {shares!r}")
    if shares == "equal" and any(later % size for size, later in pairwise(sizes)):
        raise UserError(f"equal shares need sizes that are multiples of the ones before; seen {list(sizes)}")
    first = kmeans(features, sizes[0], seed=seed, **options)
    tree = Tree(first.samples, [first.labels], [first.centroids], [np.zeros(sizes[0], np.int64)])
    for level, size in enumerate(sizes[1:], 1):
        members = rows_by_label(tree.labels[-1], len(tree.centroids[-1]))
        allotted = (
            _shares(features, tree.samples, members, size)
            if shares == "rows"
            else _equal_shares(features, tree.samples, members, size // sizes[level - 1])
        )
        _divide(features, tree, members, allotted, seed_for(seed, "kmeans tree", level), options)
    return tree


def _divide(
    features: Features,
    tree: Tree,
    members: Sequence[NDArray[np.intp]],
    shares: NDArray[np.int64],
    seed: int,
    options: Mapping[str, Any],
) -> None:
    """Add a level with so many clusters inside each cluster of the last one."""
    labels, first = np.empty_like(tree.labels[-1]), np.cumsum(shares) - shares
    jobs = [
        (tree.samples[rows], int(share), seed_for(seed, "kmeans group", group), options)
        for group, (rows, share) in enumerate(zip(members, shares, strict=True))
    ]
    found = _cluster_groups(features, jobs)
    for rows, start, (group_labels, _) in zip(members, first, found, strict=True):
        labels[rows] = start + group_labels
    tree.labels.append(labels)
    tree.centroids.append(np.concatenate([centroids for _, centroids in found]))
    tree.parents.append(np.repeat(np.arange(len(shares)), shares))


def _cluster_groups(features: Features, jobs: Sequence[_Job]) -> list[_Clusters]:
    """Small groups side by side, each on one machine; the rows of large ones stay where they are, one after another."""
    is_small = [4 * features.dim * len(samples) <= _GATHERED_BYTES for samples, *_ in jobs]
    small = iter(features.map_jobs(_cluster, [job for job, fits in zip(jobs, is_small, strict=True) if fits]))
    return [
        next(small) if fits else _clusters(SelectedRows(features, samples), num_clusters, seed, options)
        for (samples, num_clusters, seed, options), fits in zip(jobs, is_small, strict=True)
    ]


def _cluster(
    features: Features, samples: NDArray[np.int64], num_clusters: int, seed: int, options: Mapping[str, Any]
) -> _Clusters:
    """Labels and centroids of some rows, gathered here; samples ascending."""
    return _clusters(gather(features, samples), num_clusters, seed, options)


def _clusters(features: Features, num_clusters: int, seed: int, options: Mapping[str, Any]) -> _Clusters:
    found = kmeans(features, num_clusters, seed=seed, **options)
    return found.labels, found.centroids


def _num_distinct(features: Features, samples: NDArray[np.int64], most: int) -> int:
    """How many distinct rows a group has, counted up to about `most`."""
    seen: set[bytes] = set()
    for start in range(0, len(samples), _BLOCK_ROWS):
        seen.update(map(bytes, digest_rows(features.rows(samples[start : start + _BLOCK_ROWS]))))
        if len(seen) >= most:
            break
    return len(seen)


def _equal_shares(
    features: Features, samples: NDArray[np.int64], members: Sequence[NDArray[np.intp]], share: int
) -> NDArray[np.int64]:
    """Clusters per group: the same for all, at most its distinct rows."""
    return np.array([min(share, _num_distinct(features, samples[rows], share)) for rows in members])


def _shares(
    features: Features, samples: NDArray[np.int64], members: Sequence[NDArray[np.intp]], size: int
) -> NDArray[np.int64]:
    """Clusters per group: in proportion to its rows, at least one, at most its distinct rows."""
    distinct = np.array([_num_distinct(features, samples[rows], size) for rows in members])
    if distinct.sum() < size:
        raise UserError(too_few(features, int(distinct.sum()), size))
    rows = np.array([len(group) for group in members], np.float64)
    shares = np.minimum(np.maximum(1, np.floor(rows / rows.sum() * size).astype(np.int64)), distinct)
    while shares.sum() != size:
        deficit = rows / rows.sum() * size - shares
        if shares.sum() < size:
            shares[np.argmax(np.where(shares < distinct, deficit, -np.inf))] += 1
        else:
            shares[np.argmin(np.where(shares > 1, deficit, np.inf))] -= 1
    return shares
