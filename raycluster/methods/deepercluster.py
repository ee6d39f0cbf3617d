"""DeeperCluster: two levels of k-means, and a rotation predicted with the cluster (Caron et al., Unsupervised
Pre-Training of Image Features on Non-Curated Data, ICCV 2019). Where paper and published code disagree, the code is
followed, except that the rotation is drawn for every visit of an image.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raycluster.clustering.kmeans.hierarchical import fit_tree
from raycluster.clustering.whitening import whiten
from raycluster.config import settings
from raycluster.data.sampling import uniform_over_clusters, uniform_within_groups
from raycluster.methods.base import AssignmentContext, by_sample
from raycluster.methods.whitened import FeatureClustering
from raycluster.models.heads import HierarchicalHeads
from raycluster.training.hierarchical import CartesianCrossEntropy, HierarchicalCrossEntropy
from raycluster.training.objective import CrossEntropy, Objective
from raycluster.training.rotation import NUM_ROTATIONS
from raycluster.types import Assignments, Features, LabelSet, UserError

Count = Annotated[int, Field(ge=1)]


@settings
class Method(FeatureClustering):
    """Settings of DeeperCluster; with one super-cluster and without rotations it is DeepCluster.

    num_super_clusters: m of the first k-means. num_clusters: k, all sub-clusters together: k / m inside each
    super-cluster, whatever its size; one that has fewer distinct rows gets as many sub-clusters as it has, and a
    smaller head. rotations: one of four rotations is drawn for each visit of an image, and predicted. loss:
    `hierarchical`: the super-class (super-cluster and rotation), and the sub-cluster by a head for each super-class; or
    `cartesian`: one head for all pairs of sub-cluster and rotation. layer: whose output before its ReLU is clustered,
    null for the last. descriptor: `flat` takes the map as it is, `activations` after the ReLU, `pooled` its global
    average. pca_dim: components kept by whitening, null for all. iterations: of Lloyd, at either level.
    reassign_every_epochs: length of a round. engine: what finds the nearest centroid; all find the same.
    """

    name: Literal["deepercluster"] = "deepercluster"
    num_super_clusters: Count = 4
    num_clusters: Annotated[int, Field(ge=2)] = 320_000
    rotations: bool = True
    loss: Literal["hierarchical", "cartesian"] = "hierarchical"
    pca_dim: Count | None = None
    iterations: Count = 10
    reassign_every_epochs: Count = 3
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"

    def __post_init__(self) -> None:
        groups, clusters = self.num_super_clusters, self.num_clusters
        if clusters % groups:
            lower = max(1, clusters // groups) * groups
            raise UserError(
                f"num_clusters {clusters} is not a multiple of num_super_clusters {groups}: set num_clusters to "
                f"{lower} or {lower + groups}"
            )
        if self.loss == "cartesian" and groups == 1 and not self.rotations:
            raise UserError("loss cartesian has no effect without super-clusters and rotations: remove it")

    @property
    def num_super_classes(self) -> int:
        """Pairs of super-cluster and rotation."""
        return self.num_super_clusters * (NUM_ROTATIONS if self.rotations else 1)

    @property
    def is_hierarchical(self) -> bool:
        """Whether there is a head of super-classes."""
        return self.loss == "hierarchical" and self.num_super_classes > 1

    def requested_clusters(self) -> tuple[int, ...]:
        return (self.num_clusters, *([self.num_super_clusters] if self.num_super_clusters > 1 else []))

    def head_sizes(self, assignments: Assignments | None) -> tuple[int, ...]:
        parents, copies = self._parents(assignments), self.num_super_classes // self.num_super_clusters
        if self.is_hierarchical:
            return (self.num_super_classes, *np.repeat(np.bincount(parents), copies).tolist())
        return (copies * len(parents),)

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        """Label sets: sub-clusters, and super-clusters if there are several."""
        assert features is not None
        most = min(features.dim, features.num_rows)
        whitened = whiten(features, min(self.pca_dim or most, most))
        sizes = [self.num_super_clusters, self.num_clusters][self.num_super_clusters == 1 :]
        options = {"iterations": self.iterations, "engine": self.engine, "plain": True}
        tree = fit_tree(whitened, sizes, seed=context.seed, options=options, shares="equal")
        label_sets = [
            LabelSet(by_sample(context.num_samples, tree.samples, labels), len(centroids))
            for labels, centroids in zip(tree.labels[::-1], tree.centroids[::-1], strict=True)
        ]
        metrics = {"missing_clusters": float(self.num_clusters - label_sets[0].num_classes)}
        return Assignments(context.num_samples, tuple(label_sets), metrics, {"parents": tree.parents[-1]})

    def visit_counts(self, assignments: Assignments, num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        clusters, *groups = (one.labels for one in assignments.label_sets)
        if not groups:
            return uniform_over_clusters(clusters, num_rows, rng)
        return uniform_within_groups(clusters, groups[0], num_rows, rng)

    def heads(
        self, width: int, assignments: Assignments | None, *, auxiliary: tuple[int, ...], seed: int
    ) -> nn.Module | None:
        if assignments is None or not self.is_hierarchical:
            return super().heads(width, assignments, auxiliary=auxiliary, seed=seed)
        return HierarchicalHeads(width, self.head_sizes(assignments), seed)

    def objective(self, assignments: Assignments | None) -> Objective:
        parents = self._parents(assignments)
        if self.is_hierarchical:
            return HierarchicalCrossEntropy(parents, rotations=self.rotations)
        if self.num_super_classes == 1:
            return CrossEntropy()
        return CartesianCrossEntropy(len(parents), rotations=self.rotations)

    def _parents(self, assignments: Assignments | None) -> NDArray[np.int64]:
        """(k,) super-cluster of each sub-cluster: as found, or as intended."""
        if assignments is not None:
            return np.asarray(assignments.state["parents"], np.int64)
        groups = self.num_super_clusters
        return np.repeat(np.arange(groups), self.num_clusters // groups)
