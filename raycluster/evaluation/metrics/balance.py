"""Signs of a clustering that collapses, to be read beside the loss: plain functions on sizes and labels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from raycluster.evaluation.base import Declaration, Metric

DECLARATION = Declaration(
    metrics=(
        Metric("loss_over_chance", "loss over chance", higher_is_better=False),
        Metric("nmi_previous", "nmi with previous"),
        Metric("changed_share", "changed share", higher_is_better=False, headline=False),
        Metric("size_entropy", "size entropy", headline=False),
        Metric("empty_clusters", "empty clusters", higher_is_better=False, headline=False),
        Metric("singleton_clusters", "singleton clusters", higher_is_better=False, headline=False),
        Metric("largest_share", "largest share", higher_is_better=False, headline=False),
    ),
    input="clusters",
    target="none",
)


def balance(sizes: ArrayLike) -> dict[str, float]:
    """How evenly samples are spread over clusters. sizes: (K,) samples per cluster.

    empty_clusters and singleton_clusters: how many of the K. largest_share: of all samples, 1 if one cluster holds all.
    size_entropy: entropy of the sizes / ln K, 1 if all are equal, 0 if one cluster holds all (K = 1: 1).
    """
    counts = np.asarray(sizes, np.float64)
    shares = counts / max(counts.sum(), 1.0)
    present = shares[shares > 0]
    entropy = float(-(present * np.log(present)).sum())
    return {
        "empty_clusters": float((counts == 0).sum()),
        "singleton_clusters": float((counts == 1).sum()),
        "largest_share": float(shares.max(initial=0.0)),
        "size_entropy": entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
    }


def changed_share(labels: ArrayLike, previous: ArrayLike) -> float:
    """Share of samples whose label is another one than before; both (N,), row i is the same sample.

    Samples without a label (< 0) on either side are left out. Says little where clusters were numbered afresh.
    """
    new, old = np.asarray(labels), np.asarray(previous)
    both = (new >= 0) & (old >= 0)
    return float((new[both] != old[both]).mean()) if both.any() else 0.0


def loss_over_chance(loss: float, chance: float) -> float:
    """About 1 when heads know nothing, near 0 when labels are trivial; 0 where there is only one class.

    loss, chance: in nats, the loss of the heads and of heads that know nothing (`training.objective.Objective.chance`).
    """
    return loss / chance if chance else 0.0
