"""Overhead of the actor pool: seconds per iteration of k-means, relative to one process on the same machine."""

from __future__ import annotations

import shutil
import tempfile
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from raycluster.clustering.kmeans.lloyd import LloydProgress, kmeans
from raycluster.distributed.features.dataset import pooled
from raycluster.features.arrays import as_features
from raycluster.types import Features

_STEPS = 8


def run(before: str = "", rows: int = 0, clusters: str = "1000,10000", repeats: int = 3) -> str:
    """A table of the median seconds per iteration over interleaved repeats.

    before: local .npy embeddings; random rows if empty. rows: number of rows, 0 for all. Each actor may use all
    threads.
    """
    values: NDArray[np.float32] = (
        np.load(before)[: rows or None]
        if before
        else np.random.default_rng(0).standard_normal((rows or 50_000, 64), np.float32)
    )
    lines = [
        f"{len(values)} x {values.shape[1]}, {torch.get_num_threads()} threads, median of {repeats} x {_STEPS} steps",
        "",
        "| K | where | seconds per step | over one process |",
        "|---:|---|---:|---:|",
    ]
    folder = tempfile.mkdtemp(prefix="rc-", dir="/tmp")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        dataset = ray.data.from_numpy(np.array_split(values, 32))
        with pooled(dataset, num_actors=1) as one, pooled(dataset, num_actors=2) as two:
            variants = {"one process": as_features(values), "pool of 1 actor": one, "pool of 2 actors": two}
            for num_clusters in map(int, clusters.split(",")):
                lines += _rows(num_clusters, variants, repeats)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    return "\n".join(lines)


def _rows(num_clusters: int, variants: dict[str, Features], repeats: int) -> list[str]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, features in variants.items():
            seconds[name] += _steps(features, num_clusters)
    base = median(seconds["one process"])
    return [
        f"| {num_clusters} | {name} | {median(found):.3f} | {100 * (median(found) / base - 1):+.0f} % |"
        for name, found in seconds.items()
    ]


def _steps(features: Any, num_clusters: int) -> list[float]:
    """Seconds of each iteration except the first, which also imports and initialises."""
    found: list[float] = []

    def note(progress: LloydProgress) -> None:
        found.append(progress.seconds)

    kmeans(features, num_clusters, iterations=_STEPS, seed=1, report=note)
    return found[1:]
