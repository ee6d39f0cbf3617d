"""Exemplar learning: every patch is a class of its own, shown in many variations (Dosovitskiy, Fischer, Springenberg,
Riedmiller, Brox, "Discriminative unsupervised feature learning with exemplar convolutional neural networks", TPAMI
2016); and the same with similar images merged into classes, by the features of a first network (Arazo, O'Connor,
McGuinness, "Improving unsupervised learning with ExemplarCNNs", IMVIP 2019).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from raycluster.clustering.agglomerative import LinkageName, merge_classes
from raycluster.clustering.kmeans.result import unit_rows
from raycluster.config import NonEmpty, settings
from raycluster.data.sampling import uniform_over_clusters
from raycluster.features.matrix import sample_ids
from raycluster.io.assignments import read_boxes
from raycluster.io.run_paths import RunPaths
from raycluster.methods.base import AssignmentContext, BaseMethod, by_sample
from raycluster.seeding import generator
from raycluster.types import Assignments, Block, Crops, FeatureRequest, Features, LabelSet, UserError

_WHOLE = np.array([0, 0, 1, 1], np.float32)


@settings
class Merge:
    """Classes of several images, by the features of a finished run; the network is trained on them from scratch.

    run: directory of that run, of this method on the same images; its seeds are used again. layer: the maps of all
    layers up to this one describe an image. threshold: largest distance inside a cluster, of features of length 1.
    linkage: of the clusters. max_size: larger clusters are not used. num_neighbours: images that join each of the seeds
    that fill up the classes.
    """

    run: NonEmpty
    layer: str | None = "conv3"
    threshold: Annotated[float, Field(gt=0, le=2)] = 1.25
    linkage: LinkageName = "complete"
    max_size: Annotated[int, Field(ge=2)] = 7
    num_neighbours: Annotated[int, Field(ge=1)] = 3


@settings
class Method(BaseMethod):
    """Settings of exemplar learning. A round is an epoch, so that there are figures of each; labels never change.

    num_classes: surrogate classes. patches_per_image: seeds of classes in each image, of which `num_classes` are drawn.
    The side of a seed is views.train.size, in pixels of the image scaled to views.train.resize. visits_per_class: in an
    epoch. merge: null for one class per seed; else see Merge.
    """

    name: Literal["exemplar"] = "exemplar"
    num_classes: Annotated[int, Field(ge=2)] = 16_000
    patches_per_image: Annotated[int, Field(ge=1)] = 1
    visits_per_class: Annotated[int, Field(ge=1)] = 100
    merge: Merge | None = None

    resets_heads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.merge is not None and self.patches_per_image > 1:
            raise UserError(
                f"patches_per_image = {self.patches_per_image} does not go with merge, which describes whole images; "
                "set it to 1"
            )

    def requested_clusters(self) -> tuple[int, ...]:
        return (self.num_classes,)

    def crops(self, num_images: int, seed: int) -> Crops | None:
        """With several seeds per image: whole images, until `assign` has found where the seeds lie."""
        if self.patches_per_image == 1:
            return None
        images = np.repeat(np.arange(num_images), self.patches_per_image)
        return Crops(images, np.tile(_WHOLE, (len(images), 1)))

    def rows_per_epoch(self, num_samples: int) -> int:
        return self.num_classes * self.visits_per_class

    def feature_request(self, round: int) -> FeatureRequest | None:
        if round > 0:
            return None
        if self.merge is None:
            return FeatureRequest(kind="seed_boxes", view="train")
        return FeatureRequest(self.merge.layer, "quadrants", run=self.merge.run)

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        if context.previous is not None:
            return context.previous
        assert features is not None
        return self._one_seed_each(features, context) if self.merge is None else self._merged(features, context)

    def _one_seed_each(self, features: Features, context: AssignmentContext) -> Assignments:
        """As many seeds as classes, drawn from all. features: their boxes."""
        known = np.sort(sample_ids(features))
        boxes = np.tile(_WHOLE, (context.num_samples, 1))
        boxes[known] = features.rows(known)
        number = min(self.num_classes, len(known))  # fewer if images are broken
        drawn = np.sort(generator(context.seed, "classes").choice(known, number, replace=False))
        return self._assignments(by_sample(len(boxes), drawn, np.arange(number)), boxes, {})

    def _merged(self, features: Features, context: AssignmentContext) -> Assignments:
        assert self.merge is not None
        boxes = read_boxes(RunPaths(self.merge.run).assignments)
        if boxes is None or len(boxes) != context.num_samples:
            raise UserError(
                f"method.merge.run: {self.merge.run} holds {'no' if boxes is None else len(boxes)} seeds; wanted a run "
                f"of this method with one for each of these {context.num_samples} images"
            )
        found = merge_classes(
            features.map(_unit_rows),
            self.num_classes,
            threshold=self.merge.threshold,
            linkage=self.merge.linkage,
            max_size=self.merge.max_size,
            num_neighbours=self.merge.num_neighbours,
            seed=context.seed,
        )
        metrics = {"merged_clusters": float(found.num_clusters), "added_seeds": float(found.num_seeds)}
        return self._assignments(by_sample(len(boxes), found.samples, found.labels), boxes, metrics)

    def _assignments(
        self, labels: NDArray[np.int32], boxes: NDArray[np.float32], metrics: dict[str, float]
    ) -> Assignments:
        crops = Crops(np.arange(len(boxes)) // self.patches_per_image, boxes)
        return Assignments(len(boxes), (LabelSet(labels, self.num_classes),), metrics, crops=crops)

    def visit_counts(self, assignments: Assignments, num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return uniform_over_clusters(assignments.label_sets[0].labels, num_rows, rng)


def _unit_rows(block: Block) -> NDArray[np.float32]:
    return unit_rows(block.values)
