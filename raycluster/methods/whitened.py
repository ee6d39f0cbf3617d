"""What methods share that cluster the features of a layer: the features, the rounds, the sampling, and the heads."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raycluster.clustering.whitening import whiten
from raycluster.config import settings
from raycluster.data.sampling import misaligned, uniform_over_clusters
from raycluster.methods.base import BaseMethod
from raycluster.models.heads import Heads, TwoLayerHeads
from raycluster.types import Assignments, FeatureRequest, Features


@settings
class FeatureClustering(BaseMethod):
    """A method that clusters the features of one layer every so many epochs; its docstring explains the settings."""

    name: str
    layer: str | None = None
    descriptor: Literal["flat", "pooled", "activations"] = "flat"
    reassign_every_epochs: Annotated[int, Field(ge=1)] = 1

    def feature_request(self, round: int) -> FeatureRequest:
        return FeatureRequest(self.layer, self.descriptor)

    def reassign_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        return [epoch * steps_per_epoch for epoch in range(0, epochs, self.reassign_every_epochs)]


@settings
class WhitenedClusters(FeatureClustering):
    """A method with one label set, found in the whitened and normalised features (Caron et al., ECCV 2018)."""

    pca_dim: Annotated[int, Field(ge=1)] = 256
    sampling: Literal["uniform", "weighted", "legacy"] = "uniform"
    head: Literal["linear", "no_relu", "two_layers"] = "linear"

    def whitened(self, features: Features | None) -> Features:
        """The requested features, whitened to `pca_dim` columns, or to as many as there are."""
        assert features is not None
        return whiten(features, min(self.pca_dim, features.dim))

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
