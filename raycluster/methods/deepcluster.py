"""DeepCluster: k-means on PCA-whitened features (Caron et al., Deep Clustering for Unsupervised Learning of Visual
Features, ECCV 2018, section 3.2), with the sampler its paper describes: uniform over clusters.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, by_sample
from raycluster.methods.whitened import WhitenedClusters
from raycluster.types import Assignments, Features, LabelSet


@settings
class Method(WhitenedClusters):
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
    iterations: Annotated[int, Field(ge=1)] = 20
    start: Literal["random", "previous"] = "random"
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"

    def requested_clusters(self) -> tuple[int, ...]:
        return (self.num_clusters,)

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        previous = context.previous if self.start == "previous" else None
        result = kmeans(
            self.whitened(features),
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
        return Assignments(context.num_samples, (label_set,), metrics, {"centroids": result.centroids})
