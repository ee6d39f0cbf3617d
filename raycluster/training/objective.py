"""What an optimiser step minimises: a loss for every row, whichever rows it is computed with."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Batch(NamedTuple):
    """Rows of a forward pass.

    images: (n, h, w, 3) uint8 RGB per view. labels: (label sets, n) int64, below 0 for rows that a set excludes.
    weights: (n,) float32, 0 for rows that take no part. seeds: of the microbatches that the rows come from, equally
    many from each, for what `expand` draws at random. chosen: per label set, for each of these microbatches the classes
    whose logits are computed, ascending; labels are then positions among them. Empty for all classes.
    """

    images: tuple[Tensor, ...]
    labels: Tensor
    weights: Tensor
    seeds: tuple[int, ...] = ()
    chosen: tuple[tuple[Tensor, ...], ...] = ()


class Objective:
    """The loss of a method, and how the rows of a batch become those that the network sees.

    views: sections of `views` in which each sample is seen; one may occur several times. copies: rows that `expand`
    makes of one. auxiliary: numbers of classes of further heads, after those of the label sets. metrics: names of what
    `measure` returns.
    """

    views: tuple[str, ...] = ("train",)
    copies: ClassVar[int] = 1
    auxiliary: ClassVar[tuple[int, ...]] = ()
    metrics: tuple[str, ...] = ()

    def expand(self, batch: Batch) -> Batch:
        """`copies` rows for each row of the batch, next to each other."""
        return batch

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        """(n,) float32, the weight of each row applied. outputs: per view, (n, classes) logits per head."""
        raise NotImplementedError

    def measure(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        """(len(metrics), n) float32, the weight of each row applied; reported as means."""
        return batch.weights.new_zeros((0, len(batch.weights)))

    def chance(self, num_classes: Sequence[int]) -> float:
        """The loss of heads that know nothing, in nats. num_classes: of each label set."""
        return sum(map(log, num_classes)) / max(1, len(num_classes)) + sum(map(log, self.auxiliary))

    def state_dict(self) -> dict[str, Tensor]:
        """What a stateful objective (a queue, a moving average) must find again after an interruption."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""


class CrossEntropy(Objective):
    """Cross-entropy with every label set, the mean over sets.

    set_weights: of the label sets in this mean; equal if not given.
    """

    def __init__(self, set_weights: tuple[float, ...] | None = None) -> None:
        self.set_weights = set_weights

    def loss(self, outputs: Sequence[Sequence[Tensor]], batch: Batch) -> Tensor:
        return cross_entropy(outputs[0], batch.labels, batch.weights, self.set_weights)


def cross_entropy(
    logits: Sequence[Tensor], labels: Tensor, weights: Tensor, set_weights: Sequence[float] | None = None
) -> Tensor:
    """Weighted cross-entropy, mean over heads; a label below 0 or a weight of 0 adds nothing.

    logits: one (n, size) per head. labels: (heads, n) int64. weights: (n,). set_weights: of each head in the mean,
    None for equal ones. Returns (n,) float32.
    """
    targets = labels.clamp(min=-1)
    rows = torch.stack(
        [
            functional.cross_entropy(scores.float(), target, ignore_index=-1, reduction="none")
            for scores, target in zip(logits, targets, strict=True)
        ]
    )
    if set_weights is None or len(set(set_weights)) == 1:
        return rows.mean(0) * weights
    shares = torch.tensor(set_weights, device=rows.device) / sum(set_weights)
    return (rows * shares[:, None]).sum(0) * weights
