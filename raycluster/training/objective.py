"""What training minimises, row by row, so that no row's share depends on which others it is computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""(logits (n, size) per head, labels (heads, n), weights (n,)) -> (n,): the loss of each row, its weight applied."""


def cross_entropy(logits: Sequence[Tensor], labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy, mean over heads; a label below 0 or a weight of 0 adds nothing.

    logits: one (n, size) per head. labels: (heads, n) int64. weights: (n,). Returns (n,) float32.
    """
    targets = labels.clamp(min=-1)
    rows = [
        functional.cross_entropy(scores.float(), target, ignore_index=-1, reduction="none")
        for scores, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(rows).mean(0) * weights
