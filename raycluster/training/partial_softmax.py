"""Cross-entropy over part of the clusters: those in a microbatch and drawn ones (DeepCluster thesis, section 4.7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycluster.seeding import seed_for
from raycluster.training.objective import Batch, CrossEntropy, Objective
from raycluster.types import UserError


class PartialSoftmax(CrossEntropy):
    """Cross-entropy in which only `num_chosen` clusters compete: those of the labels of a microbatch, and drawn ones.

    Heads compute the logits of these alone. What is drawn follows from the labels of the microbatch, hence not from the
    microbatches that share a forward pass. num_classes: K of each label set. set_weights: as of CrossEntropy.
    """

    def __init__(
        self, num_chosen: int, num_classes: Sequence[int], set_weights: tuple[float, ...] | None = None
    ) -> None:
        super().__init__(set_weights)
        self.num_chosen, self.num_classes = num_chosen, num_classes

    def expand(self, batch: Batch) -> Batch:
        """The same rows; labels become positions among the chosen clusters of their microbatch."""
        parts = [row.chunk(len(batch.seeds)) for row in batch.labels]
        chosen = tuple(
            tuple(choose(part, size, self.num_chosen) for part in row)
            for row, size in zip(parts, self.num_classes, strict=True)
        )
        labels = [
            torch.cat([torch.searchsorted(ids, part).where(part >= 0, -1) for ids, part in zip(*pair, strict=True)])
            for pair in zip(chosen, parts, strict=True)
        ]
        return batch._replace(labels=torch.stack(labels), chosen=chosen)


def choose(labels: Tensor, num_classes: int, num_chosen: int) -> Tensor:
    """Ascending ids: the labels (n,), those below 0 left out, and others drawn until there are `num_chosen`."""
    mask = torch.zeros(num_classes, dtype=torch.bool)
    known = labels.cpu()
    mask[known[known >= 0]] = True
    missing = min(num_chosen, num_classes) - int(mask.sum())
    if missing > 0:
        generator = torch.Generator().manual_seed(seed_for(num_classes, "partial softmax", *known.tolist()))
        order = torch.randperm(num_classes, generator=generator)
        mask[order[~mask[order]][:missing]] = True
    return mask.nonzero()[:, 0].to(labels.device)


def with_partial_softmax(objective: Objective, num_chosen: int, num_classes: Sequence[int]) -> Objective:
    """The objective over part of the clusters; as it is where that would be all of them.

    num_classes: K of each label set. Raises UserError where the objective is no plain cross-entropy.
    """
    if type(objective) is not CrossEntropy:
        raise UserError(
            f"training.partial_softmax: seen {num_chosen}; wanted null for a method that minimises "
            f"{type(objective).__name__}, which is no cross-entropy over clusters: remove it"
        )
    if num_chosen >= max(num_classes, default=num_chosen + 1):
        return objective
    return PartialSoftmax(num_chosen, num_classes, objective.set_weights)
