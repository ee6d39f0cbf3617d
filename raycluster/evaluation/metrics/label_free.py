"""Scores of features and clusters that need no labels.

effective_rank (RankMe: Garrido et al., 2023) ignores the clusters: it followed linear probe accuracy over the
hyperparameters of joint-embedding methods, and falls when features collapse, but noise raises it too, so that an
untrained network may score high. intra_cluster_edges measures whether the network learned the clusters it was trained
on, as the validity indices of clustering do; it is hardly comparable across numbers of clusters, since few large
clusters are easily kept together. The agreement of clusters with those of the round before (nmi_previous in
metrics.jsonl) rises while DeepCluster trains, then saturates (Caron et al., 2018, figure 2), and grows with the number
of clusters by chance alone. In the three sweeps in the README, which have labels, only effective_rank ranked the
trials of all as kNN accuracy did; so it is the objective of sweeps without. Where labels exist, a sweep reports how
well each score ranked its trials.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raycluster.clustering.knn_graph import neighbours
from raycluster.evaluation.base import Declaration, Metric
from raycluster.features.matrix import LocalFeatures
from raycluster.types import Block

DECLARATION = Declaration(
    metrics=(Metric("intra_cluster_edges", "intra-cluster edges"), Metric("effective_rank", "effective rank")),
    target="clusters",
)

NUM_NEIGHBOURS = 10


def evaluate(x: NDArray[np.floating], clusters: NDArray[np.integer] | None) -> dict[str, float]:
    """The scores of features x (N, D), N >= 2, and of their clusters (N,); -1 takes no part in what asks for clusters.

    intra_cluster_edges: share of edges to the 10 nearest rows by cosine whose ends lie in one cluster, less what chance
    would give, over what is left to gain (1: all, 0: chance). effective_rank: exp of the entropy of the singular values
    of x, from 1 to D.
    """
    unit = x.astype(np.float32) / np.maximum(np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True), 1e-12)
    edges = {} if clusters is None else {"intra_cluster_edges": _intra_edges(unit, clusters)}
    return {**edges, "effective_rank": _effective_rank(x)}


def _intra_edges(unit: NDArray[np.float32], clusters: NDArray[np.integer]) -> float:
    taking_part = np.flatnonzero(clusters >= 0)
    count = len(taking_part)
    if count < 2:
        return 0.0
    mine = clusters[taking_part]
    features = LocalFeatures([Block(np.arange(count), unit[taking_part])])
    ids, _ = neighbours(features, min(NUM_NEIGHBOURS, count - 1))
    share = float((mine[ids] == mine[:, None]).mean())
    sizes = np.bincount(mine).astype(np.float64)
    chance = float((sizes * (sizes - 1)).sum() / (count * (count - 1)))
    return (share - chance) / (1 - chance) if chance < 1 else 0.0


def _effective_rank(x: NDArray[np.floating]) -> float:
    gram = x.astype(np.float64).T @ x.astype(np.float64)
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    shares = singular / max(float(singular.sum()), np.finfo(np.float64).tiny)
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum()))
