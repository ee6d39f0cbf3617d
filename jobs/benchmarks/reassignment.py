"""Seconds and memory of one reassignment by each method, from the same features."""

from __future__ import annotations

from multiprocessing import get_context

import numpy as np
from benchmarks.kmeans_memory import reset_peak, resident
from benchmarks.pic import Timed, load_rows, mixture, timed

from raycluster.features.arrays import as_features
from raycluster.methods import deepcluster, deepercluster, pic, sela
from raycluster.methods.base import AssignmentContext, BaseMethod


def run(before: str = "", rows: int = 50_000, dim: int = 256, clusters: int = 1000) -> str:
    """A table. before: .npy embeddings (see `embeddings`); rows of a mixture if empty. rows: number of rows, 0 for all.

    dim: of the mixture. clusters: of each method but PIC, which finds their number. Memory is the peak beyond the
    features, 4 bytes a value.
    """
    lines = ["| method | clusters | seconds | CPU s | peak MB |", "|---|---:|---:|---:|---:|"]
    for name in _methods(clusters):
        with get_context("spawn").Pool(1) as pool:
            found, megabytes = pool.apply(_measure, (name, before, rows, dim, clusters))
        lines.append(f"| {name} | {found.value} | {found.seconds:.1f} | {found.cpu:.1f} | {megabytes:.0f} |")
    return "\n".join(lines)


def _methods(clusters: int) -> dict[str, BaseMethod]:
    return {
        "DeepCluster": deepcluster.Method(num_clusters=clusters),
        "DeeperCluster, 4 super-clusters": deepercluster.Method(num_clusters=clusters),
        "PIC": pic.Method(),
        "PIC, approximate search": pic.Method(search="approximate"),
        "SeLa, 1 head": sela.Method(num_clusters=clusters),
        "SeLa, 10 heads": sela.Method(num_clusters=clusters, num_heads=10),
    }


def _measure(name: str, before: str, rows: int, dim: int, clusters: int) -> tuple[Timed, float]:
    """The number of clusters and the time, and megabytes."""
    values = load_rows(before, rows) if before else mixture(rows, dim, 0)[0]
    _assign(name, values[:2000], 40)  # compiles the kernels
    baseline = resident("VmRSS")
    reset_peak()
    found = timed(name, lambda: _assign(name, values, clusters))
    return found, (resident("VmHWM") - baseline) / 1e6


def _assign(name: str, values: np.ndarray, clusters: int) -> int:
    """The number of clusters of the first label set."""
    method = _methods(clusters)[name]
    heads = method.heads(values.shape[1], None, auxiliary=(), seed=0)
    assert heads is not None
    context = AssignmentContext(len(values), 0, 0, heads, None)
    return method.assign(as_features(values), context).label_sets[0].num_classes
