"""What a method decides: when labels are assigned and from what, how heads follow, and what a step minimises.

One file per method: `method: {name: foo}` means the class `Method` of `raycluster/methods/foo.py`, a frozen dataclass
derived from `BaseMethod` whose fields are its YAML section. Methods know neither Ray, files nor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from raycluster.data.sampling import one_visit_each
from raycluster.models.heads import Heads
from raycluster.models.neck import Neck
from raycluster.training.objective import CrossEntropy, Objective
from raycluster.types import Assignments, Crops, FeatureRequest, Features


@dataclass(frozen=True)
class AssignmentContext:
    """What `BaseMethod.assign` may use besides features.

    num_samples: N. round: counted from 0. seed: of this round's random choices. heads: of the network as it is now.
    previous: what the last call returned, None in the first.
    """

    num_samples: int
    round: int
    seed: int
    heads: nn.Module
    previous: Assignments | None


class BaseMethod:
    """The defaults of a method: a linear head per label set, cross-entropy, every sample once an epoch.

    resets_heads: whether each reassignment makes new heads; else those of the start are kept, and the numbers of
    classes must not change. trains_heads: whether optimiser steps change heads; else settings of their optimiser are
    refused.
    """

    resets_heads: ClassVar[bool] = True
    trains_heads: ClassVar[bool] = True

    def requested_clusters(self) -> tuple[int, ...]:
        """K of each label set as far as the settings say it; a data set must hold at least so many samples."""
        return ()

    def crops(self, num_images: int, seed: int) -> Crops | None:
        """The samples, where they are parts of images; None where each image is one sample."""
        return None

    def rows_per_epoch(self, num_samples: int) -> int:
        """How many visits an epoch has, before the last batch is filled."""
        return num_samples

    def feature_request(self, round: int) -> FeatureRequest | None:
        """The features that labels are assigned from; None if labels need none."""
        return None

    def reassign_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        """The optimiser steps before which labels are assigned; strictly increasing, the first is 0."""
        return [epoch * steps_per_epoch for epoch in range(epochs)]

    def assign(self, features: Features | None, context: AssignmentContext) -> Assignments:
        """Labels for all samples that have features. features: what `feature_request` asks for."""
        raise NotImplementedError

    def visit_counts(self, assignments: Assignments, num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """(N,) how often each sample is visited in an epoch of `num_rows` rows."""
        return one_visit_each(np.where(assignments.included, 0, -1), num_rows, rng)

    def sample_weights(self, assignments: Assignments) -> NDArray[np.float32]:
        """(N,) the weight of each sample in the loss, mean 1 over the included ones and 0 for the others."""
        return assignments.included.astype(np.float32)

    def head_sizes(self, assignments: Assignments | None) -> tuple[int, ...]:
        """Classes of each head for the label sets; assignments: None for those that the settings ask for."""
        return self.requested_clusters() if assignments is None else assignments.num_classes

    def neck(self, width: int, seed: int) -> Neck | None:
        """What the heads read the backbone through, trained and kept with it; None for nothing.

        width: of the features of the backbone, before their ReLU.
        """
        return None

    def heads(
        self, width: int, assignments: Assignments | None, *, auxiliary: tuple[int, ...], seed: int
    ) -> nn.Module | None:
        """New heads for the label sets just found, and after them the auxiliary ones; None keeps those there are.

        width: of what heads read: of the neck if there is one, else of the features before their ReLU. assignments:
        None for the heads of the start, which a method must not leave out. auxiliary: numbers of classes. Returns
        (n, width) -> one (n, classes) per head.
        """
        if assignments is not None and not self.resets_heads:
            return None
        sizes = () if assignments is None and self.resets_heads else self.head_sizes(assignments)
        return Heads(width, (*sizes, *auxiliary), seed, averaged=len(sizes))

    def objective(self, assignments: Assignments | None) -> Objective:
        """What training minimises until the next reassignment. assignments: None before the first."""
        return CrossEntropy(None if assignments is None else tuple(one.weight for one in assignments.label_sets))


def by_sample(num_samples: int, samples: NDArray[np.int64], labels: NDArray[np.integer]) -> NDArray[np.int32]:
    """(N,) labels by sample id, -1 for samples without one. samples, labels: (n,)."""
    found = np.full(num_samples, -1, np.int32)
    found[samples] = labels
    return found
