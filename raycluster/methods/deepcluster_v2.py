"""DeepCluster-v2: spherical k-means on projections gathered in training; the centroids are the weights of the heads
(Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS 2020, and its public
code).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from raycluster.clustering.kmeans.lloyd import kmeans
from raycluster.config import settings
from raycluster.methods.base import AssignmentContext, BaseMethod, by_sample
from raycluster.models.heads import Prototypes
from raycluster.models.neck import ProjectionNeck
from raycluster.seeding import seed_for
from raycluster.training.multi_crop import MultiCropCrossEntropy
from raycluster.training.objective import Objective
from raycluster.types import Assignments, Block, FeatureRequest, Features, LabelSet, UserError

Count = Annotated[int, Field(ge=1)]


@settings
class Method(BaseMethod):
    """Settings of DeepCluster-v2.

    num_heads: label sets found and learned together. num_clusters: prototypes of each. views: sections of `views` in
    which each visit sees an image (multi-crop); one named several times is drawn several times. assign_views: so many
    of the first, which must be the same section, are clustered; head h clusters view h modulo this number.
    projection_dim, hidden_dim: widths of the neck: linear to `hidden_dim`, batch norm, ReLU, linear to
    `projection_dim`, l2 normalisation. temperature: divides the cosines of projections and prototypes. iterations: of
    spherical k-means. engine: what finds the nearest centroid; all find the same.
    """

    name: Literal["deepcluster_v2"] = "deepcluster_v2"
    num_heads: Count = 3
    num_clusters: Annotated[int, Field(ge=2)] = 3000
    views: Annotated[tuple[str, ...], Field(min_length=1)] = ("train", "train")
    assign_views: Count = 2
    projection_dim: Count = 128
    hidden_dim: Count = 2048
    temperature: Annotated[float, Field(gt=0)] = 0.1
    iterations: Count = 10
    engine: Literal["auto", "int8", "torch", "faiss"] = "auto"

    trains_heads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        assigned = self.views[: self.assign_views]
        if len(assigned) < self.assign_views or len(set(assigned)) > 1:
            raise UserError(
                f"assign_views: seen {self.assign_views} of views {list(self.views)}; wanted so many views of the same "
                f"section at the start of views, such as {[self.views[0]] * self.assign_views}"
            )
        if self.num_heads < self.assign_views:
            raise UserError(
                f"assign_views: seen {self.assign_views}; wanted at most num_heads, {self.num_heads}, since each head "
                "clusters one view"
            )

    def requested_clusters(self) -> tuple[int, ...]:
        return (self.num_clusters,) * self.num_heads

    def feature_request(self, round: int) -> FeatureRequest:
        return FeatureRequest(
            kind="projections",
            view=self.views[0],
            visits=self.assign_views,
            online=True,
            training=True,
            concatenate=True,
        )

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        assert features is not None
        found = [
            kmeans(
                features.map(_view, head % self.assign_views, self.projection_dim),
                self.num_clusters,
                iterations=self.iterations,
                seed=seed_for(context.seed, "kmeans", head),
                engine=self.engine,
                plain=True,  # as published
                spherical=True,
            )
            for head in range(self.num_heads)
        ]
        labels = [by_sample(context.num_samples, one.samples, one.labels) for one in found]
        metrics = {
            "inertia": float(np.mean([one.inertia[-1] / len(one.samples) for one in found])),
            "num_repaired": float(sum(one.num_repaired for one in found)),
            "iterations": float(max(len(one.inertia) for one in found)),
        }
        centroids: dict[str, NDArray[np.generic]] = {
            f"centroids_{head}": one.centroids for head, one in enumerate(found)
        }
        label_sets = tuple(LabelSet(row, self.num_clusters) for row in labels)
        return Assignments(context.num_samples, label_sets, metrics, centroids)

    def neck(self, width: int, seed: int) -> ProjectionNeck:
        return ProjectionNeck(width, hidden=self.hidden_dim, num_features=self.projection_dim, seed=seed)

    def heads(
        self, width: int, assignments: Assignments | None, *, auxiliary: tuple[int, ...], seed: int
    ) -> nn.Module | None:
        """The centroids just found; no heads before the first assignment."""
        assert not auxiliary, "only plain cross-entropy takes further heads"
        state = {} if assignments is None else assignments.state
        return Prototypes([state[f"centroids_{head}"] for head in range(len(state))], self.temperature)

    def objective(self, assignments: Assignments | None) -> Objective:
        return MultiCropCrossEntropy(self.views)


def _view(block: Block, number: int, dim: int) -> NDArray[np.floating]:
    """The projections of one of the views, which lie side by side."""
    return block.values[:, number * dim : (number + 1) * dim]
