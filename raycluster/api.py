"""Public functions on any embeddings: k-means, balanced assignment, whitening, neighbours, clusters of any number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering import agglomerative as hierarchy
from raycluster.clustering import power_iteration, whitening
from raycluster.clustering.agglomerative import MAX_PAIRS, AgglomerativeClustering, LinkageName
from raycluster.clustering.approximate_knn import Search, find_neighbours
from raycluster.clustering.kmeans import lloyd
from raycluster.clustering.kmeans.hierarchical import Shares, Tree, fit_tree
from raycluster.clustering.kmeans.init import Init
from raycluster.clustering.kmeans.lloyd import LloydProgress, LloydState
from raycluster.clustering.kmeans.result import KMeans
from raycluster.clustering.power_iteration import PowerIterationClustering, Singletons
from raycluster.clustering.search.assign import Engine
from raycluster.clustering.sinkhorn import api as balanced
from raycluster.clustering.sinkhorn.api import Rounding, Sinkhorn
from raycluster.features.arrays import as_array, as_features
from raycluster.types import Features, UserError


def kmeans(
    x: Any,
    num_clusters: int,
    *,
    iterations: int = 20,
    init: Any = "random",
    spherical: bool = False,
    seed: int = 0,
    engine: Engine = "auto",
    plain: bool = False,
    column: str | None = None,
    report: Callable[[LloydProgress], None] | None = None,
) -> KMeans:
    """Cluster N rows into K clusters by exact k-means; bitwise identical for any blocks, threads, engine or machines.

    x: (N, D) numpy array or torch tensor; path or URI of .npy or Parquet files; a Ray Dataset, which is clustered by a
    pool of actors on the Ray cluster; or Features. Computed in float32. column: of Parquet files and datasets, the one
    that holds the rows. init: `random` distinct rows; `k-means++`, in its scalable form (Bahmani et al. 2012,
    algorithm 2); (K, D) centroids; (N,) labels of an earlier clustering, < 0 for none; or the `LloydState` to resume
    from. iterations: at most; fewer at a fixed point. Steps are Lloyd's (1982) with guarded heavy-ball momentum (Polyak
    1964), which needs about half as many for the same inertia; plain: without momentum. spherical: rows and centroids
    are divided by their norm, so that the nearest is the most similar (Dhillon and Modha 2001). engine: `int8`
    (compiled kernel), `torch` or `faiss`; `auto` takes the fastest available. report: called after each step.

    Returns a `KMeans`. Raises UserError if rows are NaN or infinite (their ids are listed), fewer than K or fewer than
    K distinct ones, or an argument does not fit.
    """
    start: Init | LloydState = as_array(init, "init") if hasattr(init, "detach") else init
    with _opened(x, column) as features:
        return lloyd.kmeans(
            features,
            _whole("num_clusters", num_clusters),
            iterations=_whole("iterations", iterations),
            init=start,
            spherical=spherical,
            seed=_whole("seed", seed),
            engine=engine,
            plain=plain,
            report=report,
        )


def sinkhorn(
    log_probs: Any,
    *,
    sharpness: float = 25.0,
    prior: NDArray[np.floating] | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
    start: NDArray[np.floating] | None = None,
    rounding: Rounding = "argmax",
    column: str | None = None,
) -> Sinkhorn:
    """Assign N rows to K clusters with the shares `prior` at the least cost (Asano et al., ICLR 2020, section 3.2).

    log_probs: (N, K) log-probabilities, in any of the forms of x in `kmeans`; logits give the same plan. sharpness:
    lambda of the paper, the inverse weight of the entropy. prior: (K,) shares, None for equal ones. tolerance: of the
    largest relative deviation of a cluster's share of the plan. start: `scalings[0]` of an earlier result. rounding:
    `argmax` of the plan, or `exact` sizes, those of N * prior rounded by largest remainders. The argmax of rows with
    equal log-probabilities is one cluster, however balanced the plan; a UserWarning then advises `exact`.

    Returns a `Sinkhorn` of one head. Raises UserError if rows are NaN or infinite (their ids are listed) or an argument
    does not fit.
    """
    with _opened(log_probs, column) as features:
        found = balanced.sinkhorn(
            features,
            sharpness=sharpness,
            priors=[prior],
            tolerance=tolerance,
            max_iterations=_whole("max_iterations", max_iterations),
            start=None if start is None else [start],
            rounding=rounding,
        )
    balanced.warn_of_ties(found, prior)
    return found


def whiten(x: Any, dim: int, *, column: str | None = None) -> Any:
    """PCA-whiten rows to `dim` columns and divide each by its norm (Caron et al. 2018, section 3.3).

    x: as in `kmeans`. Returns (N, dim) float32 in the order of x, or Features if x is Features. Raises UserError if dim
    is larger than the number of rows or columns, or values are NaN or infinite.
    """
    with _opened(x, column) as features:
        whitened = whitening.whiten(features, _whole("dim", dim))
        return whitened if features is x else whitened.rows(np.arange(whitened.num_rows))


def kmeans_tree(
    x: Any,
    sizes: Sequence[int],
    *,
    iterations: int = 20,
    spherical: bool = False,
    shares: Shares = "rows",
    seed: int = 0,
    engine: Engine = "auto",
    column: str | None = None,
) -> Tree:
    """Cluster into sizes[0] clusters, split these into sizes[1] in all, and so on (Caron et al. 2019, section 3.2).

    x, iterations, spherical, seed, engine: as in `kmeans`. sizes: not decreasing. shares: how the clusters of the next
    level are allotted: in proportion to `rows`, or `equal` for all clusters, whose sizes must then be multiples of the
    ones before. Each cluster gets at least one and at most as many as it has distinct rows; with equal shares the level
    then has fewer clusters than asked for. The rows of a cluster of more than 1 GiB are not moved to one machine.

    Returns a `Tree`. Raises UserError as `kmeans`, and for sizes that decrease.
    """
    options = {"iterations": _whole("iterations", iterations), "spherical": spherical, "engine": engine}
    if not np.iterable(sizes):
        raise UserError(f"sizes must list the number of clusters of each level, such as [10, 1000]; seen {sizes!r}")
    whole_sizes = [_whole("sizes", size) for size in sizes]
    with _opened(x, column) as features:
        return fit_tree(features, whole_sizes, seed=_whole("seed", seed), options=options, shares=shares)


@dataclass(frozen=True, eq=False)
class Graph:
    """The k nearest neighbours of N rows, nearest first.

    indices: (N, k) int64 row numbers. distances: (N, k) float32, squared Euclidean, in squared units of x.
    """

    indices: NDArray[np.int64]
    distances: NDArray[np.float32]


def knn(
    x: Any,
    k: int,
    *,
    search: Search = "exact",
    num_lists: int | None = None,
    num_probes: int | None = None,
    seed: int = 0,
    column: str | None = None,
) -> Graph:
    """The k nearest other rows of every row; of equal distances the lowest row. No row is its own neighbour.

    x: as in `kmeans`. search: `exact`, or `approximate` for millions of rows: only the rows of the num_probes (None for
    8) of num_lists (None for sqrt(N)) inverted lists are searched whose centroids are nearest to the row (Jegou et al.
    2011, section IV). The distances to these are exact, and the graph is that of `exact` where all lists are probed.
    seed: of the lists. Bitwise identical for any blocks or machines.

    Returns a `Graph`. Raises UserError unless 1 <= k < N, if values are NaN or infinite, or if lists are given for an
    exact search.
    """
    lists, probes = (_optional_whole(*item) for item in (("num_lists", num_lists), ("num_probes", num_probes)))
    options: dict[str, Any] = {"search": search, "num_lists": lists, "num_probes": probes, "seed": _whole("seed", seed)}
    with _opened(x, column) as features:
        return Graph(*find_neighbours(features, _whole("k", k), **options))


def power_iteration_clustering(
    x: Any,
    *,
    num_neighbours: int = 5,
    sigma: float = 0.2,
    alpha: float = 0.001,
    iterations: int = 200,
    singletons: Singletons = "redistribute",
    search: Search = "exact",
    seed: int = 0,
    column: str | None = None,
) -> PowerIterationClustering:
    """Cluster N rows into as many clusters as their graph of neighbours has modes (Caron et al. 2018, appendix).

    x: as in `kmeans`; DeepCluster passes `whiten(x, 256)`. num_neighbours: edges of each row, to its nearest others.
    sigma: bandwidth of the affinities exp(-d^2 / sigma^2), in units of x; W is the directed graph of these plus its
    transpose. alpha: weight of W in the power iteration v <- alpha W v + (1 - alpha) / N; at 0.001 the order of v is
    that of the sums of affinities. iterations: at most; fewer at a fixed point. Each row then follows the neighbour j
    of the largest W_ij (v_j - v_i), until none is above 0 (Cho and Lee 2012). singletons: clusters of one row;
    `redistribute` them to the nearest neighbour in a larger cluster, if there is one, `keep` or `discard` them.
    search, seed: of the neighbours, as in `knn`.

    If all rows are equal, they are one cluster once singletons are redistributed. But num_neighbours + 1 equal rows
    that are neighbours of each other only have equal scores, so each is a cluster of its own.

    Returns a `PowerIterationClustering`. Raises UserError unless 1 <= num_neighbours < N, if values are NaN or
    infinite, if sigma is so small that all affinities vanish, or an argument does not fit.
    """
    with _opened(x, column) as features:
        return power_iteration.power_iteration_clustering(
            features,
            num_neighbours=_whole("num_neighbours", num_neighbours),
            sigma=sigma,
            alpha=alpha,
            iterations=_whole("iterations", iterations),
            singletons=singletons,
            search=search,
            seed=_whole("seed", seed),
        )


def agglomerative(
    x: Any,
    threshold: float = 1.25,
    linkage: LinkageName = "complete",
    max_size: int = 7,
    *,
    max_pairs: int = MAX_PAIRS,
    column: str | None = None,
) -> AgglomerativeClustering:
    """Merge the two nearest clusters of N rows, at first one each, until all are further apart than the threshold.

    x: as in `kmeans`. threshold: Euclidean distance, in units of x, may be infinite. linkage: the distance of two
    clusters: the largest (`complete`), mean (`average`) or smallest (`single`) distance of a row of one and a row of
    the other, or that of `ward`: sqrt(2 a b / (a + b)) |m - n| for clusters of a and b rows with means m and n. With
    `complete` no two rows of a cluster are further apart than the threshold. max_size: clusters of 2 to max_size rows
    are marked as `kept`; the others are labelled as well. max_pairs: of rows within the threshold, which the process
    that calls holds at about 90 bytes each; `average` and `ward` need there the rows that have one within it, too.

    The clusters are those of scipy's `fcluster(linkage(x, method), threshold, "distance")`, where distances differ by
    more than rounding. Of equal distances the clusters with the lowest rows merge first, compared by the lowest row of
    the lower cluster, then that of the other; scipy's order among equals is its own.

    Returns an `AgglomerativeClustering`. Raises UserError if values are NaN or infinite (their rows are listed), if
    there are more than max_pairs, or an argument does not fit.
    """
    options: dict[str, Any] = {"max_size": _whole("max_size", max_size), "max_pairs": _whole("max_pairs", max_pairs)}
    with _opened(x, column) as features:
        return hierarchy.agglomerative(features, threshold=threshold, linkage=linkage, **options)


@contextmanager
def _opened(x: Any, column: str | None) -> Iterator[Features]:
    if type(x).__module__.partition(".")[0] == "ray":  # imported by name: other inputs do not need Ray
        with import_module("raycluster.distributed.features.dataset").pooled(x, column) as features:
            yield features
    else:
        yield as_features(x, column=column)


def _whole(name: str, value: Any) -> int:
    """An integer, also of 5.0 or a scalar tensor. Raises UserError for any other value."""
    try:
        whole = int(value)
        if whole == value:
            return whole
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{name} must be an integer; seen {value!r}")


def _optional_whole(name: str, value: Any) -> int | None:
    return None if value is None else _whole(name, value)
