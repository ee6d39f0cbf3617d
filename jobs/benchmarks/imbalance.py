"""Balanced labels (Sinkhorn) against k-means where classes are not balanced (Asano et al., ICLR 2020, table 8).

Both are runs of SeLa with the same heads, schedule, sampler and network; only the assignment differs.
Of the training images, `light` leaves out half of the last class; `heavy` keeps 10 % of the first class, 20 % of the
second, and so on. Features are evaluated on balanced images.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.runs import head, outcome, row, subset
from numpy.typing import NDArray

# Settings of the transport have no effect with k-means and must be the defaults there.
LABELS = {"sinkhorn": [], "kmeans": ["method.labels=kmeans", "method.sharpness=25", "method.tolerance=0.01"]}
COLUMNS = {"untrained knn": ".1f", "trained knn": ".1f", "trained linear_probe": ".1f", "nmi_labels": ".3f"}


def run(
    data: str,
    config: str = "configs/sela_cifar10.yaml",
    images: int = 10_000,
    epochs: int = 6,
    seeds: int = 1,
    heads: int = 10,
    clusters: int = 128,
) -> str:
    """A table, mean (standard deviation) over seeds. config: of SeLa, with optimal transport."""
    lines = [f"{images} images before removal, {epochs} epochs, {heads} x {clusters} clusters, {seeds} seeds", ""]
    lines.append(head("training images, labels by", COLUMNS))
    for name, shares in (("full", [1.0] * 10), ("light", [1.0] * 9 + [0.5]), ("heavy", np.arange(1, 11) / 10)):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            train = subset(data, Path(folder), images, partial(first_of_each, shares=np.asarray(shares)))
            settings = [f"data.uri={train}", f"training.epochs={epochs}"]
            settings += [f"method.num_heads={heads}", f"method.num_clusters={clusters}"]
            settings += ["training.schedule=cosine", "training.milestones=[]"]
            for labels, more in LABELS.items():
                found = [
                    outcome(config, f"{data}/test-*.parquet", *settings, *more, f"seed={seed}") for seed in range(seeds)
                ]
                lines.append(row(f"{name}, {labels}", found, COLUMNS))
    return "\n".join(lines)


def first_of_each(labels: NDArray[np.integer], shares: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Mask (N,) of the first images of each class. labels: (N,). shares: (num_classes,), of images to keep."""
    rank = np.empty(len(labels), np.int64)
    for label in range(len(shares)):
        members = labels == label
        rank[members] = np.arange(members.sum())
    return rank < np.ceil(np.bincount(labels, minlength=len(shares)) * shares)[labels]
