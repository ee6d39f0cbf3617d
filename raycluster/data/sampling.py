"""How often each image is visited in an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray

from raycluster.types import UserError

_ROWS = 2**18  # handled at a time: temporary arrays stay in the processor's cache


def uniform_over_clusters(labels: NDArray[np.integer], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Visits per sample, such that the visits of any two non-empty clusters differ by at most one.

    The sampler that DeepCluster describes (Caron et al., ECCV 2018, section 3.2): in a cluster of s images that is
    visited q times in all, each image has q // s visits, and q % s of them, drawn without replacement, one more. The
    clusters that have one more visit than others are drawn too.

    labels: (N,) cluster of each sample; rows labelled < 0 are excluded. -> (N,) with sum `num_rows`. Raises UserError
    if all are excluded.
    """
    sizes = _cluster_sizes(labels)
    present = np.flatnonzero(sizes)
    visits = np.zeros(len(sizes), np.int64)
    visits[present] = _equal_shares(num_rows, len(present), rng)
    each, extra = np.divmod(visits, np.maximum(sizes, 1))
    again = deepcopy(rng)  # drawing the keys twice takes less time and memory than keeping them in two orders
    limits, missing = _limits(labels, sizes, extra, rng)
    counts = np.zeros(len(labels), np.int64)
    for rows, clusters, keys in _keyed(labels, len(sizes), again):
        counts[rows] = each[clusters] + (keys < limits[clusters])
        for index in np.flatnonzero((keys == limits[clusters]) & (missing[clusters] > 0)) if missing.any() else ():
            counts[rows[index]] += missing[clusters[index]] > 0
            missing[clusters[index]] -= 1
    return counts


def _limits(
    labels: NDArray[np.integer], sizes: NDArray[np.int64], extra: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Per cluster, the key below which its `extra` smallest ones lie, and how many of these equal it (ties)."""
    keys, filled = np.empty(int(sizes.sum()), np.uint64), 0
    for _, _, some in _keyed(labels, len(sizes), rng):
        keys[filled : filled + len(some)] = some
        filled += len(some)
    keys.sort()
    first = np.cumsum(sizes) - sizes
    limits = keys[np.minimum(first + extra, len(keys) - 1)]  # clusters without samples have any
    return limits, np.where(sizes, extra - (np.searchsorted(keys, limits) - first), 0)


def _keyed(
    labels: NDArray[np.integer], num_clusters: int, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]]:
    """(included samples, their clusters, random keys that sort by cluster first), some rows at a time."""
    bits = min(53, 64 - num_clusters.bit_length())  # a random number has 53
    for start in range(0, len(labels), _ROWS):
        part = labels[start : start + _ROWS]
        rows = np.flatnonzero(part >= 0)
        clusters = part[rows].astype(np.int64)
        drawn = (rng.random(len(rows)) * 2.0**bits).astype(np.uint64)
        yield rows + start, clusters, drawn | (clusters.astype(np.uint64) << np.uint64(bits))


def _cluster_sizes(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """(K,) samples of each cluster. Raises UserError if all samples are excluded."""
    num_clusters = int(labels.max(initial=-1)) + 1
    if not num_clusters:
        raise _no_labels(len(labels))
    sizes = np.zeros(num_clusters, np.int64)
    for start in range(0, len(labels), _ROWS):
        part = labels[start : start + _ROWS]
        sizes += np.bincount(part[part >= 0], minlength=num_clusters)
    return sizes


def uniform_within_groups(
    labels: NDArray[np.integer], groups: NDArray[np.integer], num_rows: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Visits per sample: equal shares for all groups that have samples, up to one, and inside each those of
    `uniform_over_clusters`.

    labels, groups: (N,) cluster of each sample and group of its cluster; rows labelled < 0 are excluded. -> (N,) with
    sum `num_rows`. Raises UserError if all are excluded.
    """
    present = np.unique(groups[_included(labels)])
    shares = _equal_shares(num_rows, len(present), rng)
    counts = np.zeros(len(labels), np.int64)
    for group, share in zip(present, shares.tolist(), strict=True):
        counts += uniform_over_clusters(np.where(groups == group, labels, -1), share, rng)
    return counts


def misaligned(labels: NDArray[np.integer], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Visits per sample by the sampler of DeepCluster's published code, which does not balance clusters.

    From each cluster it draws equally many samples (with replacement if it has no more), but takes their numbers for
    positions in a list that is ordered by cluster: images keep their labels, and large clusters stay as frequent as
    they are. labels: (N,) cluster of each sample; rows labelled < 0 are excluded. -> (N,) with sum `num_rows`. Raises
    UserError if all are excluded.
    """
    included = _included(labels)
    order = np.argsort(labels[included], kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[included][order])) + 1)
    per = num_rows // len(members) + 1
    drawn = [rng.choice(ids, per, replace=len(ids) <= per) for ids in members]
    positions = rng.permutation(np.concatenate(drawn))[:num_rows]
    return np.bincount(included[order[positions]], minlength=len(labels))


def one_visit_each(labels: NDArray[np.integer], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One visit per sample, and further ones, drawn without replacement, up to `num_rows`.

    labels: (N,); rows labelled < 0 are excluded. -> (N,) with sum `num_rows`, which must be at least the number of
    included samples. Visits of two samples differ by at most one. Raises UserError if all are excluded.
    """
    included = _included(labels)
    if num_rows < len(included):
        raise ValueError(f"{num_rows} rows cannot visit each of {len(included)} samples; ask for more rows")
    counts = np.zeros(len(labels), np.int64)
    counts[included] = num_rows // len(included)
    counts[rng.choice(included, num_rows % len(included), replace=False)] += 1
    return counts


def whole_batches(num_samples: int, global_batch: int) -> int:
    """The fewest rows that hold every sample and fill their last batch."""
    return -(-num_samples // global_batch) * global_batch


def _equal_shares(num_rows: int, parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(parts,) shares of the rows that differ by at most one; which are larger is drawn."""
    shares = np.full(parts, num_rows // parts)
    shares[rng.permutation(parts)[: num_rows % parts]] += 1
    return shares


def _included(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    included = np.flatnonzero(labels >= 0)
    if not len(included):
        raise _no_labels(len(labels))
    return included


def _no_labels(num_samples: int) -> UserError:
    return UserError(
        f"none of {num_samples} samples has a label, so there is nothing to train on; were all images broken?"
    )
