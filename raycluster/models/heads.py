"""Prediction heads: one linear classifier per label set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
