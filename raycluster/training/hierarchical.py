"""DeeperCluster's losses (Caron et al., Unsupervised Pre-Training of Image Features on Non-Curated Data, ICCV 2019):
each image is seen in one rotation, drawn at every visit, and its cluster and its rotation are predicted together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycluster.training.objective import Batch, Objective, cross_entropy
from raycluster.training.rotation import NUM_ROTATIONS, draw_rotations, rotate_rows


class ClusterAndRotation(Objective):
    """The sum of the cross-entropies of all heads with the classes that `classes` makes of cluster and rotation.

    num_rotations: 4, or 1 for upright images. Clusters are those of the first label set.
    """

    def __init__(self, *, rotations: bool) -> None:
        self.num_rotations = NUM_ROTATIONS if rotations else 1
        self.metrics = ("rotation_accuracy",) if rotations else ()

    def classes(self, clusters: Tensor, rotations: Tensor) -> Tensor:
        """(n,) clusters and rotations -> (heads, n) int64; the first is num_rotations * x + rotation for some x."""
        raise NotImplementedError

    def expand(self, batch: Batch) -> Batch:
        """The same number of rows, each rotated; labels are those of the heads."""
        clusters, images = batch.labels[0], batch.images
        rotations = torch.zeros_like(clusters)
        if self.num_rotations > 1:
            rotations = draw_rotations(batch)
            images = tuple(rotate_rows(view, rotations) for view in images)
        labels = self.classes(clusters.clamp(min=0), rotations).where(clusters >= 0, -1)
        return batch._replace(images=images, labels=labels)

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return len(outputs[0]) * cross_entropy(outputs[0], batch.labels, batch.weights)

    def measure(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        predicted, wanted = outputs[0][0].argmax(1), batch.labels[0]
        rotations = predicted % self.num_rotations == wanted % self.num_rotations
        correct = {"super_accuracy": predicted == wanted, "rotation_accuracy": rotations}
        rows = [correct[name] * batch.weights for name in self.metrics]
        return torch.stack(rows) if rows else super().measure(outputs, batch)


class CartesianCrossEntropy(ClusterAndRotation):
    """One head for all pairs of cluster and rotation (equation 4 of the paper)."""

    def __init__(self, num_clusters: int, *, rotations: bool) -> None:
        super().__init__(rotations=rotations)
        self.num_clusters = num_clusters

    def classes(self, clusters: Tensor, rotations: Tensor) -> Tensor:
        return (self.num_rotations * clusters + rotations)[None]

    def chance(self, num_classes: Sequence[int]) -> float:
        return log(self.num_rotations * self.num_clusters)


class HierarchicalCrossEntropy(ClusterAndRotation):
    """The super-class of each row, and its cluster by the head of its super-class (the hierarchical loss of the paper).

    Super-classes are the pairs of super-cluster and rotation. parents: (k,) super-cluster of each cluster, ascending.
    Heads: `models.heads.HierarchicalHeads`.
    """

    def __init__(self, parents: NDArray[np.int64], *, rotations: bool) -> None:
        super().__init__(rotations=rotations)
        sizes = np.bincount(parents)
        self._chance = log(self.num_rotations * len(sizes)) + float(np.log(sizes).mean())
        inside = np.arange(len(parents)) - (np.cumsum(sizes) - sizes)[parents]
        self._parents, self._inside = torch.from_numpy(parents), torch.from_numpy(inside)
        if len(sizes) > 1:  # of a single one, the super-class is the rotation
            self.metrics = ("super_accuracy", *self.metrics)

    def classes(self, clusters: Tensor, rotations: Tensor) -> Tensor:
        self._parents, self._inside = self._parents.to(clusters.device), self._inside.to(clusters.device)
        return torch.stack((self.num_rotations * self._parents[clusters] + rotations, self._inside[clusters]))

    def chance(self, num_classes: Sequence[int]) -> float:
        return self._chance
