"""K-means to the inertia that faiss ends with, against what one would use instead, interleaved in one run."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster import kmeans, storage
from raycluster.clustering import kernel
from raycluster.embeddings import as_features

_FAISS_STEPS = 20


class Result(NamedTuple):
    """seconds of wall clock, cpu seconds of all threads, inertia per row after an exact assignment, steps taken."""

    seconds: float
    cpu: float
    inertia: float
    steps: int


def run(
    before: str = "",
    after: str = "",
    clusters: str = "1000,10000",
    rows: int = 0,
    repeats: int = 2,
    engines: str = "int8,torch",
    others: int = 1,
) -> str:
    """A table; its last column compares CPU seconds, which other work on a machine hardly changes.

    before, after: .npy embeddings (see `embeddings`), rows in the same order, the later ones after one more epoch.
    Without them, rows drawn from a mixture. clusters: K, or several. rows: how many to use, 0 for all. engines: of
    raycluster. others: 0 leaves out what is neither raycluster nor faiss.
    """
    early = _load(before, rows) if before else _mixture(rows or 20_000)
    late = _load(after, rows) if after else None
    lines = [
        f"{len(early)} x {early.shape[1]}, {torch.get_num_threads()} threads, kernel {_instructions()}, median of "
        f"{repeats}; seconds until the inertia of faiss (20 steps, all rows) is reached, final exact assignment "
        "included",
        "",
        "|  K | engine | steps | seconds | CPU seconds | inertia / N | times faster | CPU |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for num_clusters in map(int, str(clusters).strip("()").split(",")):
        lines += _table(early, late, num_clusters, repeats, engines.split(","))
        if others:
            base = [_faiss(early, num_clusters)]
            found = {name: [contender()] for name, contender in _others(early, num_clusters).items()}
            lines += [_row(num_clusters, name, results, base) for name, results in found.items()]
    return "\n".join(lines)


def _table(
    early: NDArray[np.float32],
    late: NDArray[np.float32] | None,
    num_clusters: int,
    repeats: int,
    engines: list[str],
) -> list[str]:
    """The rows of the table for one K: cold starts, then warm ones from the labels of the epoch before."""
    rows = _race(early, num_clusters, "random", repeats, engines, "")
    if late is not None:
        labels = kmeans(early, num_clusters, seed=1).labels
        rows += _race(late, num_clusters, labels, repeats, engines, ", next epoch")
    return rows


def _race(
    values: NDArray[np.float32], num_clusters: int, init: Any, repeats: int, engines: list[str], note: str
) -> list[str]:
    first = _faiss(values, num_clusters)
    steps = _steps_to(first.inertia, values, num_clusters, init)
    results: dict[str, list[Result]] = {"faiss": [first], **{f"raycluster {engine}": [] for engine in engines}}
    for repeat in range(repeats):
        for engine in engines:
            results[f"raycluster {engine}"].append(_ours(values, num_clusters, init, engine, steps))
        if repeat < repeats - 1:
            results["faiss"].append(_faiss(values, num_clusters))
    return [_row(num_clusters, name + note, found, results["faiss"]) for name, found in results.items()]


def _row(num_clusters: int, name: str, found: list[Result], base: list[Result]) -> str:
    seconds, cpu = (median(getattr(one, key) for one in found) for key in ("seconds", "cpu"))
    base_seconds, base_cpu = (median(getattr(one, key) for one in base) for key in ("seconds", "cpu"))
    return (
        f"| {num_clusters} | {name} | {found[0].steps} | {seconds:.2f} | {cpu:.2f} | {found[0].inertia:.5f} "
        f"| {base_seconds / seconds:.1f} | {base_cpu / cpu:.1f} |"
    )


def _instructions() -> str:
    found = kernel.support()
    return "none" if found is None else kernel.SUPPORT_NAMES[found]


def _load(uri: str, rows: int) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.load(io.BytesIO(storage.read_bytes(uri)))
    return np.ascontiguousarray(values[:: max(1, len(values) // rows)][:rows]) if rows else values


def _mixture(rows: int, dim: int = 64) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, dim))[rng.integers(200, size=rows)] + rng.standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def _timed(work: Callable[[], tuple[float, int]]) -> Result:
    began, cpu = time.perf_counter(), time.process_time()
    inertia, steps = work()
    return Result(time.perf_counter() - began, time.process_time() - cpu, inertia, steps)


def _faiss(values: NDArray[np.float32], num_clusters: int) -> Result:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def work() -> tuple[float, int]:
        found = faiss.Kmeans(
            values.shape[1], num_clusters, niter=_FAISS_STEPS, max_points_per_centroid=len(values), seed=1
        )
        found.train(values)
        distances, _ = found.index.search(values, 1)
        return float(distances.sum(dtype=np.float64)) / len(values), _FAISS_STEPS

    return _timed(work)


def _ours(values: NDArray[np.float32], num_clusters: int, init: Any, engine: Any, steps: int) -> Result:
    def work() -> tuple[float, int]:
        found = kmeans(values, num_clusters, iterations=steps, init=init, engine=engine, seed=1)
        return found.inertia[-1] / len(values), len(found.inertia) - 1

    return _timed(work)


def _steps_to(goal: float, values: NDArray[np.float32], num_clusters: int, init: Any) -> int:
    """The fewest steps after which the inertia is at most the goal; not timed."""
    features = as_features(values)
    for steps in range(1, 2 * _FAISS_STEPS):
        found = kmeans(features, num_clusters, iterations=steps, init=init, seed=1)
        if found.inertia[-1] / len(values) <= goal:
            return steps
    return 2 * _FAISS_STEPS


def _others(values: NDArray[np.float32], num_clusters: int) -> dict[str, Callable[[], Result]]:
    """The same number of steps as faiss, of what is installed."""

    def sklearn(algorithm: str) -> tuple[float, int]:
        from sklearn.cluster import KMeans

        start = values[np.random.default_rng(1).choice(len(values), num_clusters, replace=False)]
        found = KMeans(num_clusters, init=start, n_init=1, max_iter=_FAISS_STEPS, tol=0, algorithm=algorithm)
        return float(found.fit(values).inertia_) / len(values), _FAISS_STEPS

    algorithms = ["lloyd", "elkan"] if num_clusters <= 1000 else ["lloyd"]
    return {f"scikit-learn {name}": lambda name=name: _timed(lambda: sklearn(name)) for name in algorithms}
