"""The optimisers of backbone and heads, and their learning rate schedule."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from math import cos, pi, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from raycluster.models.heads import Heads
from raycluster.training.config import TrainingSettings
from raycluster.training.lars import LARS

HEADS, BIASES = "heads", "biases"
Named = tuple[str, str, Tensor]
"""Layer, name and value of a parameter."""

_FIRST_SCALE, _SMALLEST_SCALE, _STEPS_BEFORE_GROWTH = 2.0**16, 2.0**-14, 2000
_ADAM_BETA2 = 0.999


def rate(settings: TrainingSettings, epoch: float) -> float:
    """Factor on every learning rate at `epoch`, a fraction within an epoch."""
    warm = min(1.0, epoch / settings.warmup_epochs) if settings.warmup_epochs else 1.0
    if settings.schedule == "cosine":
        return warm * (1 + cos(pi * min(1.0, epoch / settings.epochs))) / 2
    if settings.schedule == "step":
        passed = bisect_right(settings.milestones, epoch)
        if isinstance(settings.decay, tuple):
            return warm * prod(settings.decay[:passed])
        return warm * (settings.decay or 0.1) ** passed
    return warm


def _body_optimiser(groups: list[dict[str, Any]], settings: TrainingSettings) -> Optimizer:
    lr, momentum = settings.lr, settings.momentum
    if settings.optimiser == "adamw":
        return AdamW(groups, lr, betas=(momentum, _ADAM_BETA2), foreach=True)
    if settings.optimiser == "lars":
        return LARS(groups, lr, momentum=momentum)
    return SGD(groups, lr, momentum=momentum, foreach=True)


class Optimisers:
    """The optimiser of the body (backbone and neck), and SGD of the heads, which is created anew with them.

    By default the heads have no momentum, as in DeepCluster's published code. Where the mean over heads is minimised,
    each head learns as if it were alone. `training.layers` sets layers apart. loss_scale: factor on the loss that keeps
    fp16 gradients in range; 1 in other precisions.
    """

    def __init__(self, body: nn.Module, heads: nn.Module, settings: TrainingSettings) -> None:
        self.settings, self.heads = settings, heads
        groups, self._body_factors = _groups(settings, _body_parameters(body))
        self.body = _body_optimiser(groups, settings)
        self.head = self._head(heads)
        self.loss_scale = _FIRST_SCALE if settings.precision == "fp16" else 1.0
        self._steps_since_change = 0

    def _head(self, heads: nn.Module) -> SGD:
        named = ((HEADS, name, parameter) for name, parameter in heads.named_parameters())
        groups, self._head_factors = _groups(self.settings, named)
        lr = self.settings.head_lr or self.settings.lr
        return SGD(groups, lr, momentum=self.settings.head_momentum, foreach=True)

    def new_heads(self, heads: nn.Module) -> None:
        """Replace the heads and the state of their optimiser; the body keeps its momentum."""
        self.heads, self.head = heads, self._head(heads)

    def step(self, epoch: float) -> None:
        """Apply the gradients at the learning rates of `epoch`."""
        factor = rate(self.settings, epoch)
        if isinstance(self.heads, Heads):
            self.heads.undo_mean()
        head_lr = self.settings.head_lr or self.settings.lr
        for optimiser, lr, of_group in (
            (self.body, self.settings.lr, self._body_factors),
            (self.head, head_lr, self._head_factors),
        ):
            for group, layer_factor in zip(optimiser.param_groups, of_group, strict=True):
                group["lr"] = lr * factor * layer_factor
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


def layer_names(backbone: nn.Module) -> list[str]:
    """What `training.layers` may name."""
    return [*dict.fromkeys(layer for layer, _, _ in _body_parameters(backbone)), HEADS, BIASES]


def _body_parameters(body: nn.Module) -> Iterator[Named]:
    """The parameters of a backbone, or of one and its neck: `body.fc1.2.weight` belongs to the layer fc1."""
    for name, parameter in body.named_parameters():
        yield name.removeprefix("backbone.").removeprefix("body.").split(".")[0], name, parameter


def _groups(settings: TrainingSettings, named: Iterable[Named]) -> tuple[list[dict[str, Any]], list[float]]:
    """The groups of an optimiser, and the factor of each on its learning rate; one group unless layers differ.

    The first group has the settings of all, and may be empty, as before the first reassignment.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {(1.0, settings.weight_decay): []}
    for layer, name, parameter in named:
        own = [settings.layers[layer]] if layer in settings.layers else []
        if name.endswith("bias") and BIASES in settings.layers:
            own.append(settings.layers[BIASES])
        factor = prod(one.lr_factor for one in own)
        decays = [one.weight_decay for one in own if one.weight_decay is not None]
        groups.setdefault((factor, decays[-1] if decays else settings.weight_decay), []).append(parameter)
    found = [{"params": parameters, "weight_decay": decay} for (_, decay), parameters in groups.items()]
    return found, [factor for factor, _ in groups]
