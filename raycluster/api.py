"""Clustering of any embeddings: k-means, balanced assignment, whitening, hierarchical k-means, neighbour graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering import knn_graph, whitening
from raycluster.clustering.kmeans import lloyd
from raycluster.clustering.kmeans.hierarchical import Tree, fit_tree
from raycluster.clustering.kmeans.init import Init
from raycluster.clustering.kmeans.lloyd import LloydProgress, LloydState
from raycluster.clustering.kmeans.result import KMeans
from raycluster.clustering.search.assign import Engine
from raycluster.clustering.sinkhorn import api as balanced
from raycluster.clustering.sinkhorn.api import Rounding, Sinkhorn
from raycluster.features.arrays import as_features
from raycluster.types import Features


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
    """Exact k-means of N rows into K clusters; bitwise identical for any blocks, threads, engine or machines.

    x: (N, D) numpy array or torch tensor; path or URI of .npy or Parquet files; a Ray Dataset, which is clustered by a
    pool of actors; or Features. column: of Parquet files and datasets, the one that holds the rows.
    init: `random` distinct rows, `k-means++` (scalable, Bahmani et al. 2012), (K, D) centroids, or (N,) labels of an
    earlier clustering, < 0 for none. Iterations are Lloyd's with guarded heavy-ball momentum, which needs about half as
    many for the same inertia; plain=True is textbook Lloyd. They stop at a fixed point. spherical: normalise rows and
    centroids, so that the nearest is the most similar (Dhillon and Modha 2001). engine: `int8` (compiled kernel),
    `torch` or `faiss`, with identical results; `auto` takes the fastest. report: called with the `LloydProgress` after
    each iteration.

    Returns centroids (K, D) float32, labels (N,), inertia (before each iteration and at the end, in squared units of
    x), sizes (K,), all positive, num_repaired; with methods `predict` and `save`. Raises UserError naming rows that are
    NaN or infinite, or if there are fewer than K distinct rows.
    """
    start: Init | LloydState = init.detach().cpu().numpy() if hasattr(init, "detach") else init
    with _opened(x, column) as features:
        return lloyd.kmeans(
            features,
            num_clusters,
            iterations=iterations,
            init=start,
            spherical=spherical,
            seed=seed,
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
    """Assign N rows of K log-probabilities to clusters of the shares `prior` at minimum cost, by Sinkhorn iterations.

    log_probs: (N, K) in any of the forms of x in `kmeans`; logits give the same plan. sharpness: the lambda of
    Asano et al. (ICLR 2020), the inverse of the entropy's weight. prior: (K,) shares, None for equal ones. tolerance:
    of the largest relative deviation of a cluster's share of the plan. start: `scalings[0]` of an earlier result.
    rounding: `argmax` of the plan, or `exact` sizes, those of N * prior rounded by largest remainders.

    Returns labels (1, N), sizes, scalings, marginal_errors, iterations, converged, costs and rounding_costs, each for a
    single head. Raises UserError naming rows that are NaN or infinite, or an invalid argument.
    """
    with _opened(log_probs, column) as features:
        return balanced.sinkhorn(
            features,
            sharpness=sharpness,
            priors=[prior],
            tolerance=tolerance,
            max_iterations=max_iterations,
            start=None if start is None else [start],
            rounding=rounding,
        )


def whiten(x: Any, dim: int, *, column: str | None = None) -> Any:
    """PCA-whiten rows to `dim` columns and divide each by its norm (Caron et al. 2018, section 3.3).

    x: as in `kmeans`. Returns (N, dim) float32 in the order of x, and Features for Features. Raises UserError if dim is
    larger than the number of rows or columns, or values are not finite.
    """
    with _opened(x, column) as features:
        whitened = whitening.whiten(features, dim)
        return whitened if features is x else whitened.rows(np.arange(whitened.num_rows))


def kmeans_tree(
    x: Any,
    sizes: Sequence[int],
    *,
    iterations: int = 20,
    spherical: bool = False,
    seed: int = 0,
    engine: Engine = "auto",
    column: str | None = None,
) -> Tree:
    """Hierarchical k-means: sizes[0] clusters, split into sizes[1] in total, and so on (Caron et al. 2019, section 3.2).

    x: as in `kmeans`. sizes: increasing. Each cluster gets a share of the next level's clusters proportional to its
    rows, at least one and at most its number of distinct rows. Returns labels and centroids of each level, and parents.
    """
    options = {"iterations": iterations, "spherical": spherical, "engine": engine}
    with _opened(x, column) as features:
        return fit_tree(features, sizes, seed=seed, options=options)


@dataclass(frozen=True, eq=False)
class Graph:
    """Neighbours of each row by ascending distance. indices: (N, k) int64. distances: (N, k) float32, squared."""

    indices: NDArray[np.int64]
    distances: NDArray[np.float32]


def knn(x: Any, k: int, *, column: str | None = None) -> Graph:
    """The exact k nearest neighbours of every row, without itself; ties go to the lowest index.

    x: as in `kmeans`. Raises UserError unless 1 <= k < N.
    """
    with _opened(x, column) as features:
        return Graph(*knn_graph.neighbours(features, k))


@contextmanager
def _opened(x: Any, column: str | None) -> Iterator[Features]:
    if type(x).__module__.partition(".")[0] == "ray":  # imported here: other inputs need no Ray
        with import_module("raycluster.distributed.features.dataset").pooled(x, column) as features:
            yield features
    else:
        yield as_features(x, column=column)
