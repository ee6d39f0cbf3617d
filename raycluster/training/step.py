"""One optimiser step as a fold over microbatches: the same step whoever computes which of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raycluster.models.backbone import Backbone
from raycluster.models.batchnorm import GhostBatchNorm
from raycluster.models.dropout import SeededDropout
from raycluster.models.heads import Heads
from raycluster.training.config import TrainingSettings
from raycluster.training.determinism import reproducible
from raycluster.training.gradient_buffer import FixedPoint, Sums
from raycluster.training.objective import Loss, cross_entropy
from raycluster.training.optimiser import Optimisers
from raycluster.training.rotation import rotate_batch, rotation_loss
from raycluster.types import UserError

_PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Microbatch(NamedTuple):
    """Rows that are always computed together.

    images: (b, h, w, 3) uint8 RGB. labels: (heads, b) int64, below 0 for rows that a head ignores. weights: (b,)
    float32. seed: names the work, e.g. seed_for(run_seed, "microbatch", step, lane); decides about dropout.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    seed: int


class StepResult(NamedTuple):
    """loss: mean over the rows that have a label, as weighted. weight: mean weight of all rows, 0 for those without
    label.

    applied: False if the step was left out because fp16 gradients did not fit.
    """

    loss: float
    weight: float
    applied: bool


class Network(nn.Module):
    """Backbone and heads: (n, 3, h, w) images -> logits per head."""

    def __init__(self, backbone: Backbone, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, images: Tensor) -> list[Tensor]:
        """(n, 3, h, w) -> one (n, size) per head."""
        logits: list[Tensor] = self.heads(self.backbone(images))
        return logits


def no_reduce(tensor: Tensor) -> None:
    """The sum over all workers, in place, for the only worker."""


class Step:
    """Makes optimiser steps of one network; make a new one when its heads are replaced.

    network: a Network, or one wrapped in DistributedDataParallel (fast mode only), which then averages the gradients;
    unwrapped, `all_reduce` sums them. all_reduce: replaces a tensor by its sum over all workers, in place. loss: of each row, None
    for the one that the settings ask for.
    """

    def __init__(
        self,
        network: nn.Module,
        optimisers: Optimisers,
        settings: TrainingSettings,
        *,
        all_reduce: Callable[[Tensor], None] = no_reduce,
        loss: Loss | None = None,
    ) -> None:
        self._network, self._optimisers, self._settings = network, optimisers, settings
        self._all_reduce = all_reduce
        self._loss = loss or (rotation_loss if settings.rotation else cross_entropy)
        self._wrapped = network if isinstance(network, DistributedDataParallel) else None
        if self._wrapped is not None and settings.mode == "exact":
            raise ValueError("exact mode adds gradients as integers: pass the network unwrapped")
        self._norms = [module for module in network.modules() if isinstance(module, GhostBatchNorm)]
        self._dropouts = [module for module in network.modules() if isinstance(module, SeededDropout)]
        for norm in self._norms:
            norm.microbatch = settings.rows_per_microbatch
        self._sums = Sums(network.parameters(), [norm.num_features for norm in self._norms], num_figures=2)
        self._fixed = FixedPoint(self._sums, settings.num_microbatches) if settings.mode == "exact" else None

    def __call__(self, microbatches: Sequence[Microbatch], *, epoch: float) -> StepResult:
        """One step from this worker's share of the microbatches (any number of them in exact mode, even none).

        epoch: how far the run is; sets the learning rate. The gradient is the mean over all rows of the global batch,
        rows without label counting as 0, and the running statistics of batch norm move by the mean over all
        microbatches. Collective. Raises UserError if training diverged; weights and statistics are then those before
        the step.
        """
        settings = self._settings
        with reproducible(settings.threads, exact=self._fixed is not None, tf32=settings.precision == "tf32"):
            self._network.train()
            self._accumulate(microbatches)
            self._reduce()
            return self._apply(epoch)

    def _accumulate(self, microbatches: Sequence[Microbatch]) -> None:
        self._sums.clear()
        if self._fixed is not None:
            self._fixed.clear()
            for microbatch in microbatches:
                self._sums.clear()
                self._forward_backward([microbatch])
                self._fixed.add(self._sums)
            return
        for together, is_last in _batches(microbatches, self._settings.microbatches_per_forward):
            with nullcontext() if is_last or self._wrapped is None else self._wrapped.no_sync():
                self._forward_backward(together)

    def _forward_backward(self, microbatches: Sequence[Microbatch]) -> None:
        """Add gradients, statistics and figures of microbatches that go through the network together."""
        device = self._sums.values.device
        images, labels, weights = (
            part.to(device, non_blocking=True)
            for part in (
                torch.cat([microbatch.images for microbatch in microbatches]),
                torch.cat([microbatch.labels for microbatch in microbatches], dim=1),
                torch.cat([microbatch.weights for microbatch in microbatches]),
            )
        )
        if self._settings.rotation:
            images, labels, weights = rotate_batch(images, labels, weights)
        for dropout in self._dropouts:
            dropout.seeds = [microbatch.seed for microbatch in microbatches]
        precision = _PRECISION[self._settings.precision]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = self._network(images.permute(0, 3, 1, 2))
        loss = self._loss(logits, labels, weights).sum() / self._settings.rows_per_microbatch
        (loss * self._optimisers.loss_scale).backward()
        weight = (weights * (labels >= 0).any(0)).sum() / self._settings.rows_per_microbatch
        statistics = [norm.statistics for norm in self._norms if norm.statistics is not None]
        self._sums.add(statistics, torch.stack((loss.detach(), weight)))

    def _reduce(self) -> None:
        """Turn own sums into means over the microbatches of all workers."""
        if self._fixed is not None:
            self._all_reduce(self._fixed.total)
            self._fixed.mean_into(self._sums)
            return
        if self._wrapped is None:
            self._all_reduce(self._sums.values)
        else:
            self._all_reduce(self._sums.others)
            self._sums.gradients.mul_(self._wrapped.process_group.size())
        self._sums.values.mul_(1 / self._settings.num_microbatches)

    def _apply(self, epoch: float) -> StepResult:
        loss, weight = self._sums.figures.tolist()
        if not isfinite(loss):
            raise UserError(
                f"training diverged: at epoch {epoch:.2f} the loss is {loss}. "
                f"Lower training.lr (now {self._settings.lr}), or set training.warmup_epochs"
            )
        applied = self._optimisers.check_overflow(self._sums.gradients)
        if applied:
            self._sums.gradients.mul_(1 / self._optimisers.loss_scale)
            for norm, statistics in zip(self._norms, self._sums.statistics, strict=True):
                norm.update(statistics)
            self._optimisers.step(epoch)
        return StepResult(loss / weight if weight else 0.0, weight, applied)


def _batches(microbatches: Sequence[Microbatch], size: int) -> Iterator[tuple[Sequence[Microbatch], bool]]:
    """Runs of at most `size`, and whether it is the last one."""
    for start in range(0, len(microbatches), size):
        yield microbatches[start : start + size], start + size >= len(microbatches)
