"""DeepCluster: k-means on PCA-whitened features (Caron et al., Deep Clustering for Unsupervised Learning of Visual
Features, ECCV 2018, section 3.2), with the sampler its paper describes: uniform over clusters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.whitening import apply_whitening, classifier, fit_whitening
from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, by_sample
from raycluster.methods.whitened import WhitenedClusters
from raycluster.models.heads import Heads
from raycluster.types import Assignments, Features, LabelSet, UserError

_TEMPERATURE = 0.4  # of heads that start as centroids: at 0.1 they are so sure that the loss begins above chance


@settings
class Method(WhitenedClusters):
    """Settings of DeepCluster.

    num_clusters: k of k-means. layer: whose output before its ReLU is clustered, null for the last. descriptor: `flat`
    takes the map as it is, `activations` after the ReLU, `pooled` its global average. pca_dim: components kept by
    whitening. iterations: of Lloyd. start: `random` rows each round as published, or the `previous` labels, which keeps
    clusters stable. reassign_every_epochs: length of a round. sampling: `uniform` over clusters; `weighted`: every
    image once, its loss weighted by the inverse size of its cluster; or `legacy`: that of the published code, which
    visits clusters by their size. head: `linear` after a ReLU as published, `no_relu`, or `two_layers`, a hidden one
    before. head_start: `random` as published, or `centroids`: new heads score the products of centroids and whitened
    features, which must then be those that heads read. engine: what finds the nearest centroid; both find the same.
    """

    name: Literal["deepcluster"] = "deepcluster"
    num_clusters: Annotated[int, Field(ge=2)] = 10_000
    iterations: Annotated[int, Field(ge=1)] = 20
    start: Literal["random", "previous"] = "random"
    head_start: Literal["random", "centroids"] = "random"
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"

    def __post_init__(self) -> None:
        if self.head_start == "random":
            return
        read = {"linear": "activations", "no_relu": "flat"}.get(self.head)
        if read is None:
            raise UserError("head_start centroids needs heads that are linear in features: set head to linear")
        if self.layer is not None or self.descriptor != read:
            raise UserError(
                f"head_start centroids needs the features that heads read: seen layer {self.layer} and descriptor "
                f"{self.descriptor}; wanted layer null and descriptor {read} for head {self.head}"
            )

    def requested_clusters(self) -> tuple[int, ...]:
        return (self.num_clusters,)

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        assert features is not None
        previous = context.previous if self.start == "previous" else None
        whitening = fit_whitening(features, min(self.pca_dim, features.dim))
        result = kmeans(
            apply_whitening(features, whitening),
            self.num_clusters,
            iterations=self.iterations,
            seed=context.seed,
            init="random" if previous is None else previous.label_sets[0].labels,
            engine=self.engine,
            plain=True,  # as published
        )
        metrics = {
            "inertia": result.inertia[-1] / len(result.samples),
            "num_repaired": float(result.num_repaired),
            "iterations": float(len(result.inertia)),
            "compiled_engine": float(result.engine == "int8"),
        }
        label_set = LabelSet(by_sample(context.num_samples, result.samples, result.labels), self.num_clusters)
        state: dict[str, NDArray[np.generic]] = {"centroids": result.centroids}
        if self.head_start == "centroids":
            state |= {"mean": whitening.mean, "projection": whitening.projection}
        return Assignments(context.num_samples, (label_set,), metrics, state)

    def heads(
        self, width: int, assignments: Assignments | None, *, auxiliary: tuple[int, ...], seed: int
    ) -> nn.Module | None:
        heads = super().heads(width, assignments, auxiliary=auxiliary, seed=seed)
        if self.head_start == "centroids" and assignments is not None:
            assert isinstance(heads, Heads)
            state: Any = assignments.state
            scale = 1 / (_TEMPERATURE * state["projection"].shape[1] ** 0.5)  # a whitened row has about this norm
            heads.start_from(classifier(state["centroids"], state["mean"], state["projection"], scale))
        return heads
