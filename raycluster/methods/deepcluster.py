"""DeepCluster: k-means on PCA-whitened features (Caron et al., Deep Clustering for Unsupervised Learning of Visual
Features, ECCV 2018, section 3.2), with the sampler its paper describes: uniform over clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.clustering.whitening import whiten
from raycluster.config import settings
from raycluster.data.sampling import one_visit_each, uniform_over_clusters
from raycluster.types import Assignments, FeatureRequest, Features, Head


@settings
class Method:
    """Settings of DeepCluster.

    num_clusters: k of k-means. layer: whose output before its ReLU is clustered, null for the last. descriptor: `flat`
    takes the map as it is, `pooled` its global average. pca_dim: components kept by whitening. iterations: of Lloyd.
    start: `random` rows each round as published, or the `previous` labels, which keeps clusters stable.
    reassign_every_epochs: length of a round. sampling: `uniform` over clusters, or `weighted`: every image once, its
    loss weighted by the inverse size of its cluster. engine: what finds the nearest centroid; both find the same.
    """

    name: Literal["deepcluster"] = "deepcluster"
    num_clusters: Annotated[int, Field(ge=2)] = 10_000
    layer: str | None = None
    descriptor: Literal["flat", "pooled"] = "flat"
    pca_dim: Annotated[int, Field(ge=1)] = 256
    iterations: Annotated[int, Field(ge=1)] = 20
    start: Literal["random", "previous"] = "random"
    reassign_every_epochs: Annotated[int, Field(ge=1)] = 1
    sampling: Literal["uniform", "weighted"] = "uniform"
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"

    resets_heads: ClassVar[bool] = True

    def heads(self) -> tuple[int, ...]:
        return (self.num_clusters,)

    def feature_request(self) -> FeatureRequest:
        return FeatureRequest(self.layer, self.descriptor)

    def reassignments(self, epochs: int, steps_per_epoch: int) -> list[int]:
        return [epoch * steps_per_epoch for epoch in range(0, epochs, self.reassign_every_epochs)]

    def assign(
        self,
        features: Features | None,
        *,
        num_samples: int,
        seed: int,
        heads: Sequence[Head],
        previous: Assignments | None,
    ) -> Assignments:
        assert features is not None
        warm = self.start == "previous" and previous is not None
        result = kmeans(
            whiten(features, min(self.pca_dim, features.dim)),
            self.num_clusters,
            iterations=self.iterations,
            seed=seed,
            init=previous.labels[0] if warm and previous is not None else "random",
            engine=self.engine,
            plain=True,  # as published
        )
        labels = np.full((1, num_samples), -1, np.int32)
        labels[0, result.samples] = result.labels
        figures = {
            "inertia": result.inertia[-1] / len(result.samples),
            "num_repaired": float(result.num_repaired),
            "iterations": float(len(result.inertia)),
            "compiled_engine": float(result.engine == "int8"),
        }
        return Assignments(labels, self.heads(), figures, {"centroids": result.centroids})

    def visit_counts(self, labels: NDArray[np.int32], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return (uniform_over_clusters if self.sampling == "uniform" else one_visit_each)(labels[0], num_rows, rng)

    def sample_weights(self, labels: NDArray[np.int32]) -> NDArray[np.float32]:
        included = labels[0] >= 0
        weights = included.astype(np.float32)
        if self.sampling == "weighted":
            sizes = np.bincount(labels[0][included])
            inverse = included.sum() / np.count_nonzero(sizes) / np.maximum(sizes, 1)
            weights[included] = inverse[labels[0][included]]
        return weights
