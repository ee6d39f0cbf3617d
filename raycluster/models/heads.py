"""Prediction heads: one linear classifier per label set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from raycluster.seeding import seed_for
from raycluster.types import Head


class Heads(nn.Module):
    """ReLU, then one linear layer per head: (n, num_features) -> [(n, size) logits for each of `sizes`].

    Weights N(0, .01), bias 0 (Caron et al., ECCV 2018), drawn from `seed`. averaged: number of heads, the first ones,
    of whose losses the mean is minimised. relu: False leaves the ReLU out. `chosen` may be set before a forward pass,
    to that of `training.objective.Batch`: the first heads then compute the logits of these classes only.
    """

    def __init__(
        self, num_features: int, sizes: Sequence[int], seed: int, *, averaged: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.averaged, self.relu = averaged, relu
        self.chosen: Sequence[Sequence[Tensor]] = ()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.ModuleList(_linear(num_features, size, generator) for size in sizes)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(n, num_features) before their ReLU -> one (n, size) per head, or (n, most chosen classes)."""
        activations = features.relu() if self.relu else features
        heads = zip_longest(self.linear, self.chosen)
        return [_some_classes(layer, activations, ids) if ids else layer(activations) for layer, ids in heads]

    def undo_mean(self) -> None:
        """Multiply the gradients of the averaged heads by their number, as if each head were alone."""
        if self.averaged > 1:
            for parameter in self.linear[: self.averaged].parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.averaged)

    @torch.no_grad()
    def start_from(self, head: Head) -> None:
        """Replace weight and bias of the first head."""
        for parameter, values in zip(self.linear[0].parameters(), head, strict=True):
            parameter.copy_(torch.from_numpy(values))

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
        return [first(activations), _cat_padded(scores)[order.argsort()]]


class TwoLayerHeads(nn.Module):
    """`Heads` on a fully connected layer of the same width, which they share: ReLU, linear, ReLU, linear."""

    def __init__(self, num_features: int, sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed_for(seed, "hidden layer"))
        self.hidden = _linear(num_features, num_features, generator)
        self.heads = Heads(num_features, sizes, seed)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(n, num_features) before their ReLU -> one (n, size) per head."""
        return self.heads(self.hidden(features.relu()))


class Prototypes(nn.Module):
    """Heads that are not trained: cosines with prototypes, divided by a temperature.

    prototypes: (size, num_features) rows of norm 1, one array per head.
    """

    def __init__(self, prototypes: Sequence[NDArray[np.generic]], temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        for number, rows in enumerate(prototypes):
            self.register_buffer(f"prototypes_{number}", torch.from_numpy(rows).clone())

    def forward(self, projections: Tensor) -> list[Tensor]:
        """(n, num_features) rows of norm 1 -> one (n, size) per head, float32 also under autocast."""
        with torch.autocast(projections.device.type, enabled=False):
            return [projections.float() @ rows.T / self.temperature for rows in self.buffers()]


def _some_classes(layer: Any, activations: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """(n, most chosen classes) logits. chosen: for each of equal parts of the rows, the classes that are computed."""
    # With sparse gradients, the backward pass touches the rows of the weights that were chosen, not all.
    scores = [
        functional.linear(part, functional.embedding(ids, layer.weight, sparse=True), layer.bias[ids])
        for part, ids in zip(activations.chunk(len(chosen)), chosen, strict=True)
    ]
    return _cat_padded(scores)


def _cat_padded(scores: Sequence[Tensor]) -> Tensor:
    """Rows of different widths below each other; the narrower ones end with -inf."""
    width = max(part.shape[1] for part in scores)
    return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in scores])


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=generator)
        layer.bias.zero_()
    return layer
