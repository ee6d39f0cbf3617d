"""Cross-entropy over part of the clusters: those in a microbatch and drawn ones (DeepCluster thesis, section 4.7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycluster.seeding import seed_for
from raycluster.training.objective import Batch, CrossEntropy, Objective, cross_entropy
from raycluster.types import UserError


class PartialSoftmax(CrossEntropy):
    """Cross-entropy in which only `num_chosen` clusters compete: those of the labels of a microbatch, and drawn ones.

    The logits of other clusters have no gradient. With as many as there are clusters it is cross-entropy. What is drawn
    follows from the labels of the microbatch, hence not from the microbatches that share a forward pass. rows: of a
    microbatch. set_weights: as of CrossEntropy.
    """

    def __init__(self, num_chosen: int, rows: int, set_weights: tuple[float, ...] | None = None) -> None:
        super().__init__(set_weights)
        self.num_chosen, self.rows = num_chosen, rows

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        splits = [batch.labels.split(self.rows, dim=1), *(scores.split(self.rows) for scores in outputs[0])]
        parts = zip(*splits, strict=True)
        logits = zip(*(self._masked(labels, scores) for labels, *scores in parts), strict=True)
        return cross_entropy([torch.cat(scores) for scores in logits], batch.labels, batch.weights, self.set_weights)

    def _masked(self, labels: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
        """labels: (sets, rows). logits: (rows, K) per set -> the same, minus infinity for clusters not chosen."""
        chosen = [choose(row, scores.shape[1], self.num_chosen) for row, scores in zip(labels, logits, strict=True)]
        return [scores.masked_fill(~mask, -torch.inf) for mask, scores in zip(chosen, logits, strict=True)]


def choose(labels: Tensor, num_classes: int, num_chosen: int) -> Tensor:
    """(num_classes,) bool: the labels (n,), those below 0 left out, and others drawn until there are `num_chosen`."""
    mask = torch.zeros(num_classes, dtype=torch.bool)
    known = labels.cpu()
    mask[known[known >= 0]] = True
    missing = num_chosen - int(mask.sum())
    if missing > 0:
        generator = torch.Generator().manual_seed(seed_for(num_classes, "partial softmax", *known.tolist()))
        order = torch.randperm(num_classes, generator=generator)
        mask[order[~mask[order]][:missing]] = True
    return mask.to(labels.device)


def with_partial_softmax(objective: Objective, num_chosen: int, rows: int) -> Objective:
    """The objective over part of the clusters. Raises UserError where it is no plain cross-entropy."""
    if type(objective) is not CrossEntropy:
        raise UserError(
            f"training.partial_softmax: seen {num_chosen}; wanted null for a method that minimises "
            f"{type(objective).__name__}, which is no cross-entropy over clusters: remove it"
        )
    return PartialSoftmax(num_chosen, rows, objective.set_weights)
