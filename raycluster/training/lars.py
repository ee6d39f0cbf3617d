"""SGD with layer-wise adaptive rates (You, Gitman, Ginsburg, Large batch training of convolutional networks, 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import SGD

_TRUST = 0.001  # of the paper, and of DeepCluster-v2's published code
_EPS = 1e-8


class LARS(SGD):
    """SGD whose gradients are replaced, tensor by tensor, by r (g + decay w) with r = 0.001 |w| / (|g| + decay |w|).

    As NVIDIA's LARC without clipping: it applies to all tensors, and where w or g is zero to none.
    """

    def __init__(self, parameters: Iterable[Any], lr: float, *, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr, momentum=momentum, weight_decay=weight_decay, foreach=True)
        for group in self.param_groups:  # the decay is part of the gradients that are scaled
            group["scaled_decay"], group["weight_decay"] = group["weight_decay"], 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Scale the gradients, in place, and apply them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _scale(parameter, group["scaled_decay"])
        super().step(closure)


def _scale(parameter: Any, decay: float) -> None:
    weight, gradient = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(parameter.grad)
    ratio = _TRUST * weight / (gradient + decay * weight + _EPS)
    scaled = (parameter.grad + decay * parameter) * ratio
    parameter.grad.copy_(scaled.where((weight > 0) & (gradient > 0), parameter.grad))
