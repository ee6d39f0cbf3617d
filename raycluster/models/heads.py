"""Prediction heads: one linear classifier per label set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from raycluster.types import Head


class Heads(nn.Module):
    """ReLU, then one linear layer per head: (n, num_features) -> [(n, size) logits for each of `sizes`].

    Weights N(0, .01), bias 0 (Caron et al., ECCV 2018), drawn from `seed`.
    """

    def __init__(self, num_features: int, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = [nn.Linear(num_features, size) for size in sizes]
        with torch.no_grad():
            for layer in layers:
                layer.weight.normal_(0, 0.01, generator=generator)
                layer.bias.zero_()
        self.linear = nn.ModuleList(layers)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(n, num_features) before their ReLU -> one (n, size) per head."""
        activations = features.relu()
        return [layer(activations) for layer in self.linear]

    def arrays(self) -> list[Head]:
        """Copies of weight (size, num_features) and bias (size,) of each head."""
        values = [parameter.detach().cpu().numpy().copy() for parameter in self.parameters()]
        return list(zip(values[::2], values[1::2], strict=True))


class HierarchicalHeads(Heads):
    """A head of all super-classes, and one head per super-class, of which each row is given that of its own.

    sizes: the number S of super-classes, then the number of classes inside each (Caron et al., ICCV 2019).
    `super_classes` must be set before each forward pass: (n,) int64, below 0 for rows that take no part.
    """

    def __init__(self, num_features: int, sizes: Sequence[int], seed: int) -> None:
        super().__init__(num_features, sizes, seed)
        assert len(sizes) == sizes[0] + 1, f"one head per super-class: {sizes[0]} of them, but sizes {sizes}"
        self.super_classes: Tensor | None = None

    def forward(self, features: Tensor) -> list[Tensor]:
        """(n, num_features) before their ReLU -> (n, S), and (n, largest size inside): smaller heads end with -inf."""
        assert self.super_classes is not None, "set super_classes before each forward pass"
        activations, own, (first, *inner) = features.relu(), self.super_classes.clamp(min=0), self.linear
        order = own.argsort(stable=True)
        # Heads without rows are computed as well: DistributedDataParallel waits for a gradient of every parameter.
        parts = activations[order].split(torch.bincount(own, minlength=len(inner)).tolist())
        scores = [layer(part) for layer, part in zip(inner, parts, strict=True)]
        width = max(part.shape[1] for part in scores)
        padded = [functional.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in scores]
        return [first(activations), torch.cat(padded)[order.argsort()]]
