"""How often each image is visited in an epoch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raycluster.types import UserError


def uniform_over_clusters(labels: NDArray[np.integer], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Visits per sample, such that the visits of any two non-empty clusters differ by at most one.

    The sampler that DeepCluster describes (Caron et al., ECCV 2018, section 3.2): in a cluster of s images that is
    visited q times in all, each image has q // s visits, and q % s of them, drawn without replacement, one more. The
    clusters that have one more visit than others are drawn too.

    labels: (N,) cluster of each sample; rows labelled < 0 are excluded. -> (N,) with sum `num_rows`. Raises UserError
    if all are excluded.
    """
    included = _included(labels)
    _, cluster, sizes = np.unique(labels[included], return_inverse=True, return_counts=True)
    visits = _equal_shares(num_rows, len(sizes), rng)
    order = np.lexsort((rng.random(len(included)), cluster))
    rank = np.empty(len(included), np.int64)  # of each sample in a random order of its cluster
    rank[order] = np.arange(len(included)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    counts = np.zeros(len(labels), np.int64)
    counts[included] = visits[cluster] // sizes[cluster] + (rank < visits[cluster] % sizes[cluster])
    return counts


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
        raise UserError(
            f"none of {len(labels)} samples has a label, so there is nothing to train on; were all images broken?"
        )
    return included
