"""Other k-means libraries: a number of iterations and a final exact assignment, on all threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Contender = Callable[[Rows, int, int], Rows]
"""(rows (N, D), number of clusters, iterations) -> centroids (K, D)."""

_SEED = 1


class Entry(NamedTuple):
    """work: the timed function. package: to be installed. steps: iterations for a number of clusters."""

    work: Contender
    package: str
    steps: Callable[[int], int]


def faiss(values: Rows, num_clusters: int, steps: int) -> Rows:
    """Flat L2, all rows."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    dim = values.shape[1]
    found = faiss.Kmeans(dim, num_clusters, niter=steps, max_points_per_centroid=len(values), seed=_SEED)
    found.train(values)
    found.index.search(values, 1)
    return np.asarray(found.centroids)


def _sklearn(values: Rows, num_clusters: int, steps: int, *, algorithm: str = "lloyd", intel: bool = False) -> Rows:
    if intel:
        from sklearnex.cluster import KMeans
    else:
        from sklearn.cluster import KMeans
    start = values[np.random.default_rng(_SEED).choice(len(values), num_clusters, replace=False)]
    found = KMeans(num_clusters, init=start, n_init=1, max_iter=steps, tol=0, algorithm=algorithm)
    return np.asarray(found.fit(values).cluster_centers_, np.float32)


def _fastkmeans(values: Rows, num_clusters: int, steps: int) -> Rows:
    from fastkmeans import FastKMeans

    found = FastKMeans(values.shape[1], num_clusters, niter=steps, gpu=False, seed=_SEED, tol=0)
    found.train(values)
    found.predict(values)
    return np.asarray(found.centroids, np.float32)


def _superkmeans(values: Rows, num_clusters: int, steps: int, *, quantizer: str = "f32") -> Rows:
    from superkmeans import SuperKMeans

    found = SuperKMeans(
        num_clusters,
        values.shape[1],
        hierarchical=False,
        quantizer=quantizer,
        iters=steps,
        sampling_fraction=1.0,
        max_points_per_cluster=len(values),
        n_threads=torch.get_num_threads(),
        seed=_SEED,
        early_termination=False,
    )
    centroids = np.ascontiguousarray(found.train(values), np.float32)
    found.assign(values, centroids)
    return centroids


def _few(num_clusters: int) -> int:
    return 20 if num_clusters <= 1000 else 2


ENTRIES: dict[str, Entry] = {
    "scikit-learn lloyd": Entry(_sklearn, "sklearn", _few),
    "scikit-learn elkan": Entry(
        partial(_sklearn, algorithm="elkan"), "sklearn", lambda num_clusters: 4 if num_clusters <= 1000 else 0
    ),
    "sklearnex lloyd": Entry(partial(_sklearn, intel=True), "sklearnex", _few),
    "fastkmeans": Entry(_fastkmeans, "fastkmeans", _few),
    "SuperKMeans": Entry(_superkmeans, "superkmeans", _few),
    "SuperKMeans, 8 bits": Entry(partial(_superkmeans, quantizer="sq8"), "superkmeans", _few),
}


def installed(entry: Entry) -> bool:
    """Whether the package of the entry is installed."""
    return find_spec(entry.package) is not None
