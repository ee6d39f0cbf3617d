"""Agglomerative clustering against scipy and scikit-learn, which hold the matrix of all distances."""

from __future__ import annotations

import sys
import time
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from benchmarks.kmeans_memory import reset_peak, resident
from benchmarks.pic import load_rows
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


class Measured(NamedTuple):
    """Labels, seconds of wall clock and of all processors, and bytes by which the peak exceeds the rows."""

    labels: Labels
    seconds: float
    cpu: float
    peak: int


def run(
    before: str = "",
    rows: int = 10_000,
    dim: int = 256,
    threshold: float = 1.1,
    linkages: str = "complete,average,single,ward",
    others: str = "scipy,scikit-learn",
) -> str:
    """A table: seconds, CPU seconds, peak memory beside the rows, and whether the clusters are those of raycluster.

    before: .npy embeddings (see `embeddings`); unit rows in groups of about five if empty. rows: number of rows, 0 for
    all. dim: of the groups. threshold: at which the tree is cut. linkages: separated by commas. others: what to compare
    with; empty for raycluster alone. Each measurement is made in a process of its own.
    """
    titles = ["clusters", "s", "CPU s", "peak beside the rows, MB", "same clusters", "faster", "CPU"]
    lines = [f"| linkage | method | {' | '.join(titles)} |", f"|---|---|{'---:|' * len(titles)}"]
    for linkage in linkages.split(","):
        base: Measured | None = None
        for method in ["raycluster", *filter(None, others.split(","))]:
            with get_context("spawn").Pool(1) as pool:
                found = pool.apply(_measure, (method, (before, rows, dim), threshold, linkage))
            base = base or found
            lines.append(_line(linkage, method, found, base))
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _line(linkage: str, method: str, found: Measured, base: Measured) -> str:
    same = "yes" if same_partition(found.labels, base.labels) else "no"
    return (
        f"| {linkage} | {method} | {len(np.unique(found.labels))} | {found.seconds:.2f} | {found.cpu:.2f} "
        f"| {found.peak / 1e6:.0f} | {same} | {found.seconds / base.seconds:.1f} | {found.cpu / base.cpu:.1f} |"
    )


def same_partition(labels: Labels, others: Labels) -> bool:
    """Whether two labellings are equal but for the numbers of their clusters."""
    sizes = [len(np.unique(each, axis=-1).T) for each in (labels, others, np.stack([labels, others]))]
    return len(set(sizes)) == 1


def groups(rows: int, dim: int, seed: int = 0) -> Rows:
    """Unit rows around N / 5 random centres, about 0.9 from the others of their group and 1.4 from the rest."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, rows // 5), dim), np.float32)
    values = centres[rng.integers(len(centres), size=rows)]
    for start in range(0, rows, 4096):  # in parts: making them must not be the peak
        part = values[start : start + 4096]
        part += np.float32(0.8) * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return values


def _measure(method: str, source: tuple[str, int, int], threshold: float, linkage: Any) -> Measured:
    """A small problem first: what is loaded or compiled once is not measured."""
    before, rows, dim = source
    values = load_rows(before, rows) if before else groups(rows, dim)
    METHODS[method](values[:512], threshold, linkage)
    resting = resident("VmRSS")
    reset_peak()
    began, cpu = time.perf_counter(), time.process_time()
    labels = METHODS[method](values, threshold, linkage)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Measured(labels, seconds, cpu, resident("VmHWM") - resting)


def _raycluster(values: Rows, threshold: float, linkage: Any) -> Labels:
    import raycluster

    return raycluster.agglomerative(values, threshold, linkage).labels


def _scipy(values: Rows, threshold: float, linkage: str) -> Labels:
    from scipy.cluster import hierarchy

    labels: Labels = hierarchy.fcluster(hierarchy.linkage(values, linkage), threshold, "distance")
    return labels


def _scikit_learn(values: Rows, threshold: float, linkage: str) -> Labels:
    from sklearn.cluster import AgglomerativeClustering

    found = AgglomerativeClustering(n_clusters=None, distance_threshold=threshold, linkage=linkage).fit(values)
    labels: Labels = found.labels_
    return labels


METHODS = {"raycluster": _raycluster, "scipy": _scipy, "scikit-learn": _scikit_learn}
