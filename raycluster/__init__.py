"""Deep clustering of images on Ray: features become assignments, assignments labels, and labels train the network."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

# The threads of torch share the cores with decoding tasks: spinning while they wait, they would halve the throughput.
# Read when the OpenMP library is loaded, hence before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Found when first used: tasks that only decode images must not import torch.
_PUBLIC = {
    "fit": "raycluster.distributed.train.trainer",
    "kmeans": "raycluster.api",
    "kmeans_tree": "raycluster.api",
    "knn": "raycluster.api",
    "load_backbone": "raycluster.models.export",
    "load_kmeans": "raycluster.clustering.kmeans.result",
    "sinkhorn": "raycluster.api",
    "whiten": "raycluster.api",
}

__all__ = ["fit", "kmeans", "kmeans_tree", "knn", "load_backbone", "load_kmeans", "sinkhorn", "whiten"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
