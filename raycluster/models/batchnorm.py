"""Batch norm per microbatch, so that no result depends on how many microbatches share a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm


class GhostBatchNorm(nn.Module):
    """Batch norm in which each group of `microbatch` consecutive rows is normalised by its own statistics.

    (n, C) or (n, C, h, w) -> same shape. Hoffer et al., Train longer, generalize better, NeurIPS 2017, section 4. A
    forward pass in training adds to `statistics`, (2, C) mean and unbiased variance, summed over the groups; running
    statistics only change by `update`, to be called with the mean over all microbatches of an optimiser step. In
    evaluation it is ordinary batch norm. `microbatch` None: all rows are one group.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.microbatch: int | None = None
        self.statistics: Tensor | None = None
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, values: Tensor) -> Tensor:
        """(n, C) or (n, C, h, w) -> same shape. ValueError if rows are not whole groups of several values."""
        if not self.training:
            return batch_norm(values, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        rows = self.microbatch or len(values)
        per_group = rows * values[0, 0].numel()
        if len(values) % rows or per_group < 2:
            raise ValueError(
                f"{len(values)} rows of {per_group // rows} positions cannot be normalised in groups of {rows} rows: "
                "wanted whole groups of at least two values per channel"
            )
        out, mean, invstd = _Normalise.apply(values, self.weight, self.bias, len(values) // rows, self.eps)
        variance = (invstd.square().reciprocal() - self.eps).clamp_(min=0) * (per_group / (per_group - 1))
        statistics = torch.stack((mean.sum(0), variance.sum(0)))
        self.statistics = statistics if self.statistics is None else self.statistics + statistics
        return out

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Move the running statistics towards (2, C) mean and variance of one optimiser step."""
        self.running_mean.lerp_(statistics[0], self.momentum)
        self.running_var.lerp_(statistics[1], self.momentum)

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"{self.num_features}, eps={self.eps}, microbatch={self.microbatch}"


class _Normalise(torch.autograd.Function):
    """`native_batch_norm` of each group, written into one tensor; also returns the statistics that it computes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
        if groups == 1:
            out, mean, invstd = torch.native_batch_norm(values, weight, bias, None, None, True, 0.0, eps)
            mean, invstd = mean[None], invstd[None]
        else:
            out = torch.empty_like(values)
            mean, invstd = weight.new_empty(2, groups, len(weight))
            parts = zip(values.chunk(groups), out.chunk(groups), mean, invstd, strict=True)
            for part, *targets in parts:
                torch.native_batch_norm(part, weight, bias, None, None, True, 0.0, eps, out=tuple(targets))
        ctx.save_for_backward(values, weight, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, invstd)
        return out, mean, invstd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, mean, invstd = ctx.saved_tensors
        groups = len(mean)
        parts = [
            torch.ops.aten.native_batch_norm_backward(part, value, weight, None, None, m, i, True, ctx.eps, [True] * 3)
            for part, value, m, i in zip(gradients[0].chunk(groups), values.chunk(groups), mean, invstd, strict=True)
        ]
        if groups == 1:
            return *parts[0], None, None
        into, scale, shift = zip(*parts, strict=True)
        return torch.cat(into), torch.stack(scale).sum(0), torch.stack(shift).sum(0), None, None
