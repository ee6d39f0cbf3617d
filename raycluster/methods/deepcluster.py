"""DeepCluster: k-means on PCA-whitened features (Caron et al., Deep Clustering for Unsupervised Learning of Visual
Features, ECCV 2018, section 3.2), with the sampler its paper describes: uniform over clusters.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.whitening import whiten
from raycluster.config import settings
from raycluster.data.sampling import misaligned, uniform_over_clusters
from raycluster.methods.base import AssignmentContext, BaseMethod
from raycluster.models.heads import Heads, TwoLayerHeads
from raycluster.types import Assignments, FeatureRequest, Features, LabelSet


@settings
class Method(BaseMethod):
    """Settings of DeepCluster.

    num_clusters: k of k-means. layer: whose output before its ReLU is clustered, null for the last. descriptor: `flat`
    takes the map as it is, `activations` after the ReLU, `pooled` its global average. pca_dim: components kept by
    whitening. iterations: of Lloyd. start: `random` rows each round as published, or the `previous` labels, which keeps
    clusters stable. reassign_every_epochs: length of a round. sampling: `uniform` over clusters; `weighted`: every
    image once, its loss weighted by the inverse size of its cluster; or `legacy`: that of the published code, which
    visits clusters by their size. head: `linear` after a ReLU as published, `no_relu`, or `two_layers`, a hidden one
    before. engine: what finds the nearest centroid; both find the same.
    """

    name: Literal["deepcluster"] = "deepcluster"
    num_clusters: Annotated[int, Field(ge=2)] = 10_000
    layer: str | None = None
    descriptor: Literal["flat", "pooled", "activations"] = "flat"
    pca_dim: Annotated[int, Field(ge=1)] = 256
    iterations: Annotated[int, Field(ge=1)] = 20
    start: Literal["random", "previous"] = "random"
    reassign_every_epochs: Annotated[int, Field(ge=1)] = 1
    sampling: Literal["uniform", "weighted", "legacy"] = "uniform"
    head: Literal["linear", "no_relu", "two_layers"] = "linear"
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"

    def requested_clusters(self) -> tuple[int, ...]:
        return (self.num_clusters,)

    def feature_request(self, round: int) -> FeatureRequest:
        return FeatureRequest(self.layer, self.descriptor)

    def reassign_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        return [epoch * steps_per_epoch for epoch in range(0, epochs, self.reassign_every_epochs)]

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        assert features is not None
        previous = context.previous if self.start == "previous" else None
        result = kmeans(
            whiten(features, min(self.pca_dim, features.dim)),
            self.num_clusters,
            iterations=self.iterations,
            seed=context.seed,
            init="random" if previous is None else previous.label_sets[0].labels,
            engine=self.engine,
            plain=True,  # as published
        )
        labels = np.full(context.num_samples, -1, np.int32)
        labels[result.samples] = result.labels
        metrics = {
            "inertia": result.inertia[-1] / len(result.samples),
            "num_repaired": float(result.num_repaired),
            "iterations": float(len(result.inertia)),
            "compiled_engine": float(result.engine == "int8"),
        }
        label_set = LabelSet(labels, self.num_clusters)
        return Assignments(context.num_samples, (label_set,), metrics, {"centroids": result.centroids})

    def visit_counts(self, assignments: Assignments, num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.sampling == "weighted":
            return super().visit_counts(assignments, num_rows, rng)
        sample = uniform_over_clusters if self.sampling == "uniform" else misaligned
        return sample(assignments.label_sets[0].labels, num_rows, rng)

    def sample_weights(self, assignments: Assignments) -> NDArray[np.float32]:
        if self.sampling != "weighted":
            return super().sample_weights(assignments)
        labels = assignments.label_sets[0].labels
        sizes = np.bincount(labels[labels >= 0])
        inverse = sizes.sum() / np.count_nonzero(sizes) / np.maximum(sizes, 1)
        return np.where(labels >= 0, inverse[labels], 0).astype(np.float32)

    def heads(
        self, width: int, assignments: Assignments | None, *, auxiliary: tuple[int, ...], seed: int
    ) -> nn.Module | None:
        sizes = (*(() if assignments is None else assignments.num_classes), *auxiliary)
        if self.head == "two_layers":
            return TwoLayerHeads(width, sizes, seed)
        return Heads(width, sizes, seed, relu=self.head == "linear")
