"""Deep clustering on Ray: pre-training of image networks on labels from clustering their own features."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# Idle torch threads that spin would halve the throughput of decoding tasks on the same cores. OpenMP reads the variable
# when it is loaded, hence it is set before any import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Imported on first use: tasks that only decode images must not import torch.
_PUBLIC = {
    "agglomerative": "raycluster.api",
    "fit": "raycluster.distributed.train.trainer",
    "kmeans": "raycluster.api",
    "kmeans_tree": "raycluster.api",
    "knn": "raycluster.api",
    "load_backbone": "raycluster.models.export",
    "load_kmeans": "raycluster.clustering.kmeans.result",
    "power_iteration_clustering": "raycluster.api",
    "pretrain": "raycluster.run.loop",
    "sinkhorn": "raycluster.api",
    "whiten": "raycluster.api",
}

__all__ = [
    "agglomerative",
    "fit",
    "kmeans",
    "kmeans_tree",
    "knn",
    "load_backbone",
    "load_kmeans",
    "power_iteration_clustering",
    "pretrain",
    "sinkhorn",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
