"""What methods share that cluster whitened features: the features, the rounds, and the sampling of clusters."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raycluster.clustering.whitening import whiten
from raycluster.config import settings
from raycluster.data.sampling import uniform_over_clusters
from raycluster.methods.base import BaseMethod
from raycluster.types import Assignments, FeatureRequest, Features


@settings
class WhitenedClusters(BaseMethod):
    """A method with one label set, found in the whitened and normalised features of a layer (Caron et al., ECCV 2018).

    The docstrings of the methods explain the settings.
    """

    name: str
    layer: str | None = None
    descriptor: Literal["flat", "pooled"] = "flat"
    pca_dim: Annotated[int, Field(ge=1)] = 256
    reassign_every_epochs: Annotated[int, Field(ge=1)] = 1
    sampling: Literal["uniform", "weighted"] = "uniform"

    def feature_request(self, round: int) -> FeatureRequest:
        return FeatureRequest(self.layer, self.descriptor)

    def reassign_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        return [epoch * steps_per_epoch for epoch in range(0, epochs, self.reassign_every_epochs)]

    def whitened(self, features: Features | None) -> Features:
        """The requested features, whitened to `pca_dim` columns, or to as many as there are."""
        assert features is not None
        return whiten(features, min(self.pca_dim, features.dim))

    def visit_counts(self, assignments: Assignments, num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.sampling == "weighted":
            return super().visit_counts(assignments, num_rows, rng)
        return uniform_over_clusters(assignments.label_sets[0].labels, num_rows, rng)

    def sample_weights(self, assignments: Assignments) -> NDArray[np.float32]:
        if self.sampling == "uniform":
            return super().sample_weights(assignments)
        labels = assignments.label_sets[0].labels
        sizes = np.bincount(labels[labels >= 0])
        inverse = sizes.sum() / np.count_nonzero(sizes) / np.maximum(sizes, 1)
        return np.where(labels >= 0, inverse[labels], 0).astype(np.float32)
