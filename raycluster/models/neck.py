"""Necks: what heads read a backbone through. They are trained and kept with it, and are no part of its export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from raycluster.models.batchnorm import GhostBatchNorm


class Neck(nn.Module):
    """(n, width of the backbone) before its ReLU -> (n, num_features), the input of the heads."""

    num_features: int


class ProjectionNeck(Neck):
    """ReLU, linear, batch norm, ReLU, linear, l2 normalisation (Chen et al., ICML 2020; Caron et al., NeurIPS 2020).

    hidden: width between the linear layers. Weights are uniform within 1 / sqrt(inputs), biases 0, drawn from `seed`.
    """

    def __init__(self, width: int, *, hidden: int, num_features: int, seed: int) -> None:
        super().__init__()
        self.num_features = num_features
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(
            nn.ReLU(),
            _linear(width, hidden, generator),
            GhostBatchNorm(hidden),
            nn.ReLU(inplace=True),
            _linear(hidden, num_features, generator),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(n, width) -> (n, num_features) float32 rows of norm 1."""
        return functional.normalize(self.layers(features).float())


@torch.no_grad()
def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    layer.bias.zero_()
    return layer
