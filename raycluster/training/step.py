"""One optimiser step as a fold over microbatches: the same step for any distribution of them over workers."""

from __future__ import annotations

from collections import OrderedDict
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
from raycluster.models.heads import Heads, HierarchicalHeads
from raycluster.models.neck import Neck
from raycluster.training.config import TrainingSettings
from raycluster.training.determinism import reproducible
from raycluster.training.gradient_buffer import FixedPoint, Sums
from raycluster.training.objective import Batch, CrossEntropy, Objective
from raycluster.training.optimiser import Optimisers
from raycluster.types import UserError

_PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Microbatch(NamedTuple):
    """Rows that are always computed together.

    images: (b, h, w, 3) uint8 RGB, or (b, h, w, 2) float16 Sobel gradients. labels: (label sets, b) int64, below 0 for
    rows that a set excludes. weights: (b,) float32, 0 for rows that take no part. seed: names the work, e.g.
    seed_for(run_seed, "microbatch", step, stream); decides about dropout and rotations. extra_views: the same rows in
    further views.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    seed: int
    extra_views: tuple[Tensor, ...] = ()


class StepResult(NamedTuple):
    """loss, metrics: weighted means over the rows that take part. weight: mean weight of all rows. applied: False if
    the step was skipped because fp16 gradients overflowed.
    """

    loss: float
    weight: float
    applied: bool
    metrics: dict[str, float]


class Network(nn.Module):
    """Backbone, neck and heads: images in one or several views -> logits per view and head.

    neck: what heads read the backbone through, trained and kept with it; None for nothing. num_features: width of what
    the heads read.
    """

    def __init__(self, backbone: Backbone, heads: nn.Module, neck: Neck | None = None) -> None:
        super().__init__()
        self.num_features = backbone.num_features if neck is None else neck.num_features
        self.backbone, self.neck, self.heads = backbone, neck or nn.Identity(), heads

    @property
    def body(self) -> nn.Module:
        """All but the heads: images -> what the heads read."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, neck=self.neck))

    def forward(self, *views: Tensor) -> list[list[Tensor]]:
        """(n, 3, h, w) per view -> per view, one (n, classes) per head."""
        return [self.heads(self.neck(self.backbone(images))) for images in views]


def no_reduce(tensor: Tensor) -> None:
    """The sum over all workers, in place, for the only worker."""


class Step:
    """Makes optimiser steps of one network; make a new one when its heads are replaced.

    network: a Network, or one wrapped in DistributedDataParallel (fast mode only), which then averages the gradients;
    unwrapped, `all_reduce` sums them. all_reduce: replaces a tensor by its sum over all workers, in place. objective:
    what to minimise, cross-entropy unless given.
    """

    def __init__(
        self,
        network: nn.Module,
        optimisers: Optimisers,
        settings: TrainingSettings,
        *,
        all_reduce: Callable[[Tensor], None] = no_reduce,
        objective: Objective | None = None,
    ) -> None:
        self._network, self._optimisers, self._settings = network, optimisers, settings
        self._all_reduce = all_reduce
        self._objective = objective or CrossEntropy()
        self._rows = settings.microbatch * self._objective.copies  # that the network sees of a microbatch
        self._wrapped = network if isinstance(network, DistributedDataParallel) else None
        if self._wrapped is not None and settings.mode == "exact":
            raise ValueError("exact mode adds gradients as integers: pass the network unwrapped")
        self._norms = [module for module in network.modules() if isinstance(module, GhostBatchNorm)]
        self._dropouts = [module for module in network.modules() if isinstance(module, SeededDropout)]
        self._heads = [module for module in network.modules() if isinstance(module, Heads)]
        for norm in self._norms:
            norm.microbatch = self._rows
        num_figures = 2 + len(self._objective.metrics)
        self._sums = Sums(network.parameters(), [norm.num_features for norm in self._norms], num_figures=num_figures)
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
        size = self._settings.microbatches_per_forward(self._objective.copies)
        for together, is_last in _batches(microbatches, size):
            with nullcontext() if is_last or self._wrapped is None else self._wrapped.no_sync():
                self._forward_backward(together)

    def _forward_backward(self, microbatches: Sequence[Microbatch]) -> None:
        """Add gradients, statistics and figures of microbatches that go through the network together."""
        batch = self._objective.expand(_batch(microbatches, self._sums.values.device))
        for dropout in self._dropouts:
            dropout.seeds = [microbatch.seed for microbatch in microbatches]
        for norm in self._norms:
            norm.statistics = None
        for heads in self._heads:
            heads.chosen = batch.chosen
            if isinstance(heads, HierarchicalHeads):
                heads.super_classes = batch.labels[0]
        precision = _PRECISION[self._settings.precision]
        with torch.autocast(batch.weights.device.type, precision, enabled=precision != torch.float32):
            outputs = self._network(*(images.permute(0, 3, 1, 2) for images in batch.images))
        loss = self._objective.loss(outputs, batch).sum() / self._rows
        (loss * self._optimisers.loss_scale).backward()
        with torch.no_grad():
            metrics = self._objective.measure(outputs, batch).sum(1) / self._rows
        weight = batch.weights.sum() / self._rows
        statistics = [norm.statistics for norm in self._norms if norm.statistics is not None]
        if len(batch.images) > 1:  # each view is a forward pass of its own
            statistics = [summed / len(batch.images) for summed in statistics]
        self._sums.add(statistics, torch.cat((torch.stack((loss.detach(), weight)), metrics)))

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
        loss, weight, *metrics = self._sums.figures.tolist()
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
        means = [figure / weight if weight else 0.0 for figure in (loss, *metrics)]
        return StepResult(means[0], weight, applied, dict(zip(self._objective.metrics, means[1:], strict=True)))


def _batches(microbatches: Sequence[Microbatch], size: int) -> Iterator[tuple[Sequence[Microbatch], bool]]:
    """Runs of at most `size`, and whether it is the last one."""
    for start in range(0, len(microbatches), size):
        yield microbatches[start : start + size], start + size >= len(microbatches)


def _batch(microbatches: Sequence[Microbatch], device: torch.device) -> Batch:
    """The rows of all microbatches on the device; those without any label take no part."""
    views = zip(*((one.images, *one.extra_views) for one in microbatches), strict=True)
    images = tuple(torch.cat(parts).to(device, non_blocking=True) for parts in views)
    labels = torch.cat([one.labels for one in microbatches], dim=1).to(device, non_blocking=True)
    weights = torch.cat([one.weights for one in microbatches]).to(device, non_blocking=True)
    included = weights * (labels >= 0).any(0) if len(labels) else weights
    return Batch(images, labels, included, tuple(one.seed for one in microbatches))
