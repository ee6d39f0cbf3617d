"""Two levels of k-means against a single one with as many clusters."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.pic import Rows, load_rows, mixture, timed

from raycluster import kmeans, kmeans_tree


def run(
    before: str = "", rows: int = 100_000, dim: int = 256, sizes: str = "4x1000,10x1000,20x1000,40x1000", seed: int = 0
) -> str:
    """A table: seconds, and the mean squared distance of rows to the centroids of their clusters.

    before: .npy embeddings (see `embeddings`); rows of a mixture if empty. rows: number of rows, 0 for all. dim: of the
    mixture. sizes: super-clusters x clusters of all of them together, separated by commas; the flat k-means of as many
    clusters is in the table for each different number. All make 10 iterations from random rows; shares are equal.
    """
    values = load_rows(before, rows) if before else mixture(rows, dim, seed)[0]
    pairs = [tuple(map(int, words.split("x"))) for words in sizes.split(",")]
    kmeans(values[:4096], 10, iterations=2)  # compiles the kernel
    flat = {
        clusters: timed(f"flat, {clusters}", partial(kmeans, values, clusters, iterations=10, seed=seed))
        for clusters in dict.fromkeys(clusters for _, clusters in pairs)
    }
    lines = [f"{len(values)} x {values.shape[1]}, {torch.get_num_threads()} threads", ""]
    lines += ["| clusters | seconds | CPU s | distance | faster | CPU |", "|---|---:|---:|---:|---:|---:|"]
    for clusters, base in flat.items():
        lines.append(_row(f"{clusters}", base, base, _distance(values, base.value.labels, base.value.centroids)))
    for groups, clusters in pairs:
        tree = partial(kmeans_tree, values, [groups, clusters], iterations=10, seed=seed, shares="equal")
        found = timed(f"{groups} x {clusters // groups}", tree)
        distance = _distance(values, found.value.labels[-1], found.value.centroids[-1])
        lines.append(_row(f"{groups} x {clusters // groups}", found, flat[clusters], distance))
    return "\n".join(lines)


def _row(name: str, found: Any, base: Any, distance: float) -> str:
    faster, cpu = base.seconds / found.seconds, base.cpu / found.cpu
    return f"| {name} | {found.seconds:.2f} | {found.cpu:.2f} | {distance:.4f} | {faster:.1f} | {cpu:.1f} |"


def _distance(values: Rows, labels: Any, centroids: Rows) -> float:
    return float(np.square(values - centroids[labels]).sum(axis=1, dtype=np.float64).mean())
