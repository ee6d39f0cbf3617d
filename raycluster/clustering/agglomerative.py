"""Agglomerative clustering cut at a distance, exactly, without the matrix of all distances.

At a threshold only the pairs of rows within it matter: they are found where the rows are, and clusters merge on their
graph, which is held in one place. `merge_classes` turns the clusters into classes for exemplar learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.kmeans.result import unit_rows
from raycluster.clustering.knn_graph import neighbours, sorted_samples
from raycluster.clustering.linkage import Average, Complete, Linkage, Ward, join_components, merge
from raycluster.clustering.search.close_pairs import Pairs, close_pairs, concatenate
from raycluster.features.matrix import feature_stats
from raycluster.features.selected import SelectedRows
from raycluster.seeding import generator
from raycluster.types import Block, Features, UserError

LinkageName = Literal["complete", "average", "single", "ward"]

MAX_PAIRS = 50_000_000
_BYTES_PER_PAIR = 90  # at the peak, in the first round of merging
_CANDIDATES = 16  # neighbours searched at a time, some of which earlier seeds will have taken


@dataclass(frozen=True, eq=False)
class AgglomerativeClustering:
    """A clustering cut at a distance. Row i belongs to samples[i] (ascending).

    samples, labels: (N,) int64; clusters are numbered by their lowest sample ids. sizes: (num_clusters,) int64 rows of
    each. kept: (num_clusters,) bool, those of 2 to max_size rows. num_pairs: pairs of rows within the threshold.
    """

    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_clusters: int
    sizes: NDArray[np.int64]
    kept: NDArray[np.bool_]
    num_pairs: int


@dataclass(frozen=True, eq=False)
class MergedClasses:
    """Classes made of clusters and of seeds with their neighbours. Row i belongs to samples[i] (ascending).

    samples, labels: (N,) int64; the classes of clusters come first, by their lowest sample ids, then those of seeds, as
    drawn; -1 is a row that is not used. num_clusters, num_seeds: classes of either kind, num_classes in all.
    """

    samples: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_classes: int
    num_clusters: int
    num_seeds: int


def agglomerative(
    features: Features,
    *,
    threshold: float = 1.25,
    linkage: LinkageName = "complete",
    max_size: int = 7,
    max_pairs: int = MAX_PAIRS,
) -> AgglomerativeClustering:
    """See `raycluster.agglomerative`; bitwise identical for any blocks in any order."""
    _check(threshold, linkage, max_size, max_pairs)
    feature_stats(features)
    samples, _ = sorted_samples(features)
    if linkage == "single":
        roots, num_pairs = _components(features, samples, threshold)
    else:
        pairs = _all_pairs(features, samples, threshold, max_pairs)
        roots, num_pairs = _merged(features, samples, pairs, threshold, linkage), len(pairs.low)
    _, labels, sizes = np.unique(roots, return_inverse=True, return_counts=True)
    return AgglomerativeClustering(samples, labels, len(sizes), sizes, (sizes > 1) & (sizes <= max_size), num_pairs)


def merge_classes(
    features: Features,
    num_classes: int,
    *,
    threshold: float = 1.25,
    linkage: LinkageName = "complete",
    max_size: int = 7,
    num_neighbours: int = 3,
    seed: int = 0,
) -> MergedClasses:
    """Make classes of similar rows: clusters of 2 to max_size rows, then seeds, each with its nearest neighbours.

    threshold, linkage: of the clusters, see `raycluster.agglomerative`; of more than num_classes the largest are taken,
    of equal sizes those with the lowest sample ids. Seeds are drawn from the other rows; one after the other takes the
    num_neighbours rows of largest cosine that no class has yet, of equal ones the lowest sample ids. After Arazo's
    clustering of exemplar classes, where num_classes is 16,000. Bitwise identical for any blocks in any order.

    Raises UserError as `agglomerative` does, and if there are too few rows for num_classes.
    """
    if num_classes < 1 or num_neighbours < 1:
        raise UserError(
            f"num_classes and num_neighbours must be at least 1; seen {num_classes} and {num_neighbours}: choose more"
        )
    found = agglomerative(features, threshold=threshold, linkage=linkage, max_size=max_size)
    kept = np.flatnonzero(found.kept)
    kept = np.sort(kept[np.argsort(-found.sizes[kept], kind="stable")][:num_classes])
    numbers = np.full(found.num_clusters, -1)
    numbers[kept] = np.arange(len(kept))
    labels = numbers[found.labels]
    num_seeds, free = num_classes - len(kept), int((labels < 0).sum())
    size = 1 + num_neighbours
    if num_seeds * size > free:
        raise UserError(
            f"num_classes={num_classes} needs {num_seeds} seeds beside the {len(kept)} clusters of 2 to {max_size} "
            f"rows, each with {num_neighbours} neighbours: {num_seeds * size} rows, of which {free} are left. Choose "
            f"num_classes of at most {len(kept) + free // size}, or fewer num_neighbours"
        )
    if num_seeds:
        _add_seeds(features, found.samples, labels, range(len(kept), num_classes), num_neighbours, seed)
    return MergedClasses(found.samples, labels, num_classes, len(kept), num_seeds)


def _components(features: Features, samples: NDArray[np.int64], threshold: float) -> tuple[NDArray[np.int64], int]:
    """Single linkage: the lowest row of the component of every row, and the number of pairs, which are not kept."""
    roots, num_pairs = np.arange(len(samples)), 0
    for pairs in close_pairs(features, samples, threshold):
        roots, num_pairs = join_components(roots, pairs), num_pairs + len(pairs.low)
    return roots, num_pairs


def _all_pairs(features: Features, samples: NDArray[np.int64], threshold: float, max_pairs: int) -> Pairs:
    """All pairs of rows within the threshold, in order."""
    parts, total = [], 0
    for pairs in close_pairs(features, samples, threshold):
        parts.append(pairs)
        total += len(pairs.low)
        if total > max_pairs:
            raise UserError(
                f"of the {len(samples) * (len(samples) - 1) // 2} pairs of {len(samples)} rows, more than {max_pairs} "
                f"are within the threshold {threshold:g}; at {_BYTES_PER_PAIR} bytes each they would take more than "
                f"{max_pairs * _BYTES_PER_PAIR / 2**30:.2g} GiB of memory. Lower the threshold, cluster fewer rows, or "
                "raise max_pairs if the memory allows it; single linkage keeps no pairs"
            )
    pairs = concatenate(parts)
    del parts
    return pairs.chosen(np.lexsort((pairs.high, pairs.low)))


def _merged(
    features: Features, samples: NDArray[np.int64], pairs: Pairs, threshold: float, linkage: LinkageName
) -> NDArray[np.int64]:
    """The lowest row of the cluster of every row. Only rows with others within the threshold are merged."""
    near = np.zeros(len(samples), bool)
    near[pairs.low] = near[pairs.high] = True
    members = np.flatnonzero(near)
    numbers = (np.cumsum(near) - 1).astype(np.int32)
    pairs = Pairs(numbers[pairs.low], numbers[pairs.high], pairs.distances)
    roots = np.arange(len(samples))
    if len(members):
        roots[members] = members[merge(pairs, len(members), threshold, _linkage(features, samples[members], linkage))]
    return roots


def _linkage(features: Features, samples: NDArray[np.int64], name: LinkageName) -> Linkage:
    if name == "complete":
        return Complete()
    return Average(features.rows(samples)) if name == "average" else Ward(features.rows(samples))


def _add_seeds(
    features: Features,
    samples: NDArray[np.int64],
    labels: NDArray[np.int64],
    numbers: range,
    num_neighbours: int,
    seed: int,
) -> None:
    """Label a seed and its neighbours with each of these numbers, in place. Rows labelled -1 are free."""
    free = np.flatnonzero(labels < 0)
    seeds = iter(generator(seed, "merge classes").permutation(free))
    units = features.map(_unit_rows)
    candidates = _nearest_free(units, samples, labels, num_neighbours)
    for number in numbers:
        row = next(row for row in seeds if labels[row] < 0)
        nearest = [other for other in candidates[row] if labels[other] < 0][:num_neighbours]
        if len(nearest) < num_neighbours:
            candidates = _nearest_free(units, samples, labels, num_neighbours)
            nearest = candidates[row][:num_neighbours].tolist()
        labels[[row, *nearest]] = number


def _nearest_free(
    units: Features, samples: NDArray[np.int64], labels: NDArray[np.int64], num_neighbours: int
) -> NDArray[np.int64]:
    """(N, k) row numbers of the nearest free rows of every free row."""
    free = np.flatnonzero(labels < 0)
    k = min(max(_CANDIDATES, 2 * num_neighbours), len(free) - 1)
    ids, _ = neighbours(SelectedRows(units, samples[free]), k)
    found = np.empty((len(labels), k), np.int64)
    found[free] = np.searchsorted(samples, ids)
    return found


def _unit_rows(block: Block) -> NDArray[np.float32]:
    """Rows whose squared distances order them by cosine."""
    return unit_rows(block.values)


def _check(threshold: float, linkage: str, max_size: int, max_pairs: int) -> None:
    if not threshold > 0:
        raise UserError(f"threshold must be a distance above 0; seen {threshold!r}")
    if linkage not in get_args(LinkageName):
        raise UserError(f"linkage must be one of {', '.join(get_args(LinkageName))}; seen {linkage!r}")
    if max_size < 2 or max_pairs < 1:
        raise UserError(f"max_size must be at least 2 and max_pairs at least 1; seen {max_size} and {max_pairs}")
