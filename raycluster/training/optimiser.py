"""The optimisers of backbone and heads, and their learning rate schedule."""

from __future__ import annotations

from bisect import bisect_right
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from raycluster.models.heads import Heads
from raycluster.training.config import TrainingSettings
from raycluster.training.lars import LARS

_FIRST_SCALE, _SMALLEST_SCALE, _STEPS_BEFORE_GROWTH = 2.0**16, 2.0**-14, 2000
_ADAM_BETA2 = 0.999


def rate(settings: TrainingSettings, epoch: float) -> float:
    """Factor on every learning rate at `epoch`, a fraction within an epoch."""
    warm = min(1.0, epoch / settings.warmup_epochs) if settings.warmup_epochs else 1.0
    if settings.schedule == "cosine":
        return warm * (1 + cos(pi * min(1.0, epoch / settings.epochs))) / 2
    if settings.schedule == "step":
        return warm * (settings.decay or 0.1) ** bisect_right(settings.milestones, epoch)
    return warm


def _body_optimiser(body: nn.Module, settings: TrainingSettings) -> Optimizer:
    parameters, lr, momentum, decay = body.parameters(), settings.lr, settings.momentum, settings.weight_decay
    if settings.optimiser == "adamw":
        return AdamW(parameters, lr, betas=(momentum, _ADAM_BETA2), weight_decay=decay, foreach=True)
    if settings.optimiser == "lars":
        return LARS(parameters, lr, momentum=momentum, weight_decay=decay)
    return SGD(parameters, lr, momentum=momentum, weight_decay=decay, foreach=True)


class Optimisers:
    """The optimiser of the body (backbone and neck), and SGD of the heads, which is created anew with them.

    By default the heads have no momentum, as in DeepCluster's published code. Where the mean over heads is minimised,
    each head learns as if it were alone. loss_scale: factor on the loss that keeps fp16 gradients in range; 1 in other
    precisions.
    """

    def __init__(self, body: nn.Module, heads: nn.Module, settings: TrainingSettings) -> None:
        self.settings, self.heads = settings, heads
        self.body = _body_optimiser(body, settings)
        self.head = self._head(heads)
        self.loss_scale = _FIRST_SCALE if settings.precision == "fp16" else 1.0
        self._steps_since_change = 0

    def _head(self, heads: nn.Module) -> SGD:
        return SGD(
            [{"params": [*heads.parameters()]}],  # as a group, which may be empty before the first reassignment
            self.settings.head_lr or self.settings.lr,
            momentum=self.settings.head_momentum,
            weight_decay=self.settings.weight_decay,
            foreach=True,
        )

    def new_heads(self, heads: nn.Module) -> None:
        """Replace the heads and the state of their optimiser; the body keeps its momentum."""
        self.heads, self.head = heads, self._head(heads)

    def step(self, epoch: float) -> None:
        """Apply the gradients at the learning rates of `epoch`."""
        factor = rate(self.settings, epoch)
        if isinstance(self.heads, Heads):
            self.heads.undo_mean()
        for optimiser, lr in ((self.body, self.settings.lr), (self.head, self.settings.head_lr or self.settings.lr)):
            optimiser.param_groups[0]["lr"] = lr * factor
            optimiser.step()

    def check_overflow(self, gradients: Tensor) -> bool:
        """Whether the scaled gradients are finite, without which the step must be skipped; updates the loss scale."""
        if self.settings.precision != "fp16":
            return True
        fits = bool(torch.isfinite(torch.linalg.vector_norm(gradients, torch.inf)))
        self._steps_since_change += 1
        if not fits:
            self.loss_scale, self._steps_since_change = max(self.loss_scale / 2, _SMALLEST_SCALE), 0
        elif self._steps_since_change == _STEPS_BEFORE_GROWTH:
            self.loss_scale, self._steps_since_change = self.loss_scale * 2, 0
        return fits

    def state_dict(self) -> dict[str, Any]:
        """State of both optimisers and of the loss scale."""
        return {
            "body": self.body.state_dict(),
            "head": self.head.state_dict(),
            "loss_scale": self.loss_scale,
            "steps_since_change": self._steps_since_change,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.body.load_state_dict(state["body"])
        self.head.load_state_dict(state["head"])
        self.loss_scale, self._steps_since_change = state["loss_scale"], state["steps_since_change"]
