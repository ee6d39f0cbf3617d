"""One file per method: a frozen dataclass `Method`; its fields are its YAML section, its methods are its behaviour.

`method: {name: foo}` means `raycluster/methods/foo.py`. What a method must offer is `Method` below; see
`deepcluster.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raycluster.types import Assignments, FeatureRequest, Features, Head


class Method(Protocol):
    """The behaviour of a deep clustering method, as `pretrain` uses it."""

    name: str
    resets_heads: bool

    def heads(self) -> tuple[int, ...]:
        """Number of clusters of each head."""

    def feature_request(self) -> FeatureRequest | None:
        """The features that labels are assigned from; None if labels need none."""

    def reassignments(self, epochs: int, steps_per_epoch: int) -> list[int]:
        """The optimiser steps before which labels are assigned anew; strictly increasing, the first is 0."""

    def assign(
        self,
        features: Features | None,
        *,
        num_samples: int,
        seed: int,
        heads: Sequence[Head],
        previous: Assignments | None,
    ) -> Assignments:
        """Labels for all samples that have features.

        features: what `feature_request` asks for. heads: of the network as it is now. previous: what the last call returned.
        """

    def visit_counts(self, labels: NDArray[np.int32], num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """How often each sample is visited in an epoch of `num_rows` rows; (heads, N) labels -> (N,)."""

    def sample_weights(self, labels: NDArray[np.int32]) -> NDArray[np.float32]:
        """The weight of each sample in the loss; (heads, N) labels -> (N,), mean 1 over the samples that take part."""
