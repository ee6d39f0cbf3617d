"""DeepCluster with power iteration clustering (PIC) in place of k-means: the number of clusters is found in each round
(Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018, appendix). Where paper and
published code disagree, the code is followed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raycluster.clustering.power_iteration import power_iteration_clustering
from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, by_sample
from raycluster.methods.whitened import WhitenedClusters
from raycluster.types import Assignments, Features, LabelSet, UserError


@settings
class Method(WhitenedClusters):
    """Settings of PIC.

    num_neighbours: edges of each image in the graph. sigma: bandwidth of the affinities exp(-d^2 / sigma^2) of
    normalised features. alpha: weight of the graph in the power iteration; larger values give fewer clusters.
    iterations: of it, at most. singletons: clusters of one image; `redistribute` them to the nearest neighbour in a
    larger cluster as published, `keep` them, or `discard` the image until the next round. search: of the neighbours,
    `exact` as published, or `approximate` for millions of images. layer: whose output before its ReLU is clustered,
    null for the last. descriptor: `flat` takes the map as it is, `activations` after the ReLU, `pooled` its global
    average. pca_dim: components kept by whitening. reassign_every_epochs: length of a round. sampling: `uniform` over
    clusters, `weighted` or `legacy`, and head: as of DeepCluster.
    """

    name: Literal["pic"] = "pic"
    num_neighbours: Annotated[int, Field(ge=1)] = 5
    sigma: Annotated[float, Field(gt=0)] = 0.2
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.001
    iterations: Annotated[int, Field(ge=1)] = 200
    singletons: Literal["redistribute", "keep", "discard"] = "redistribute"
    search: Literal["exact", "approximate"] = "exact"

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        found = power_iteration_clustering(
            self.whitened(features),
            num_neighbours=self.num_neighbours,
            sigma=self.sigma,
            alpha=self.alpha,
            iterations=self.iterations,
            singletons=self.singletons,
            search=self.search,
            seed=context.seed,
        )
        if not found.num_clusters:
            raise UserError(
                f"all {len(found.samples)} images are clusters of their own, and method.singletons = discard leaves "
                f"none: raise method.sigma (seen {self.sigma:g}), or keep singletons"
            )
        labels = by_sample(context.num_samples, found.samples, found.labels)
        metrics = {"singletons": float(found.num_singletons)}
        return Assignments(context.num_samples, (LabelSet(labels, found.num_clusters),), metrics)
