"""Batch norm per microbatch, so that no result depends on how many microbatches share a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

# Values of a group up to which moving them takes less time than a call per group; the size for GPUs is an estimate.
_SMALL = {True: 2**12, False: 2**20}  # by whether it is a CPU


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
        variance = (invstd.pow(-2) - self.eps).clamp_(min=0).mul_(per_group / (per_group - 1))
        statistics = torch.stack((mean, variance)).sum(1)
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
    """Each group by its own statistics; also returns these: (groups, C) mean and 1 / standard deviation.

    Small groups side by side, as columns of one matrix, in one call of the framework's kernel; large ones in turn. On
    CPUs, channels_last values whose channels fill whole vectors (multiples of 16) give bitwise what they give alone.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
        ctx.together = groups > 1 and values.numel() // groups <= _SMALL[values.is_cpu]
        if ctx.together:
            kept, weight = _side_by_side(values, groups), weight.repeat(groups)
            flat, mean, invstd = _batch_norm(kept, weight, bias.repeat(groups), eps)
            out, mean, invstd = _stacked(flat, values, groups), mean.view(groups, -1), invstd.view(groups, -1)
        elif groups == 1:
            kept, (out, mean, invstd) = values, _batch_norm(values, weight, bias, eps)
            mean, invstd = mean[None], invstd[None]
        else:
            kept, out = values, torch.empty_like(values)
            mean, invstd = weight.new_empty(2, groups, len(weight))
            for part, *targets in zip(values.chunk(groups), out.chunk(groups), mean, invstd, strict=True):
                _batch_norm(part, weight, bias, eps, out=tuple(targets))
        ctx.save_for_backward(kept, weight, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # the statistics need no zeros as gradients
        return out, mean, invstd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, (kept, weight, mean, invstd) = gradients[0], ctx.saved_tensors
        groups = len(mean)
        if gradient is None:
            return (None,) * 5
        if ctx.together:
            flat = _side_by_side(gradient, groups)
            found = _gradients(flat, kept, weight, mean.flatten(), invstd.flatten(), ctx.eps)
            into, (scale, shift) = _stacked(found[0], gradient, groups), (part.view(groups, -1) for part in found[1:])
            return into, scale.sum(0), shift.sum(0), None, None
        parts = [
            _gradients(part, value, weight, m, i, ctx.eps)
            for part, value, m, i in zip(gradient.chunk(groups), kept.chunk(groups), mean, invstd, strict=True)
        ]
        if groups == 1:
            return *parts[0], None, None
        inputs, scales, shifts = zip(*parts, strict=True)
        return torch.cat(inputs), torch.stack(scales).sum(0), torch.stack(shifts).sum(0), None, None


def _batch_norm(values: Tensor, weight: Tensor, bias: Tensor, eps: float, **out: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1 / standard deviation."""
    return torch.native_batch_norm(values, weight, bias, None, None, True, 0.0, eps, **out)


def _gradients(
    gradient: Tensor, values: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of values, weight and bias."""
    return torch.ops.aten.native_batch_norm_backward(
        gradient, values, weight, None, None, mean, invstd, True, eps, [True] * 3
    )


def _side_by_side(values: Tensor, groups: int) -> Tensor:
    """(n, C, ...) -> (positions of a group, groups * C)."""
    return values.unflatten(0, (groups, -1)).movedim((0, 2), (-2, -1)).flatten(-2).flatten(0, -2)


def _stacked(flat: Tensor, like: Tensor, groups: int) -> Tensor:
    """The inverse of `_side_by_side`, in the shape and memory format of `like`."""
    out = torch.empty_like(like)
    rows = out.unflatten(0, (groups, -1)).movedim((0, 2), (-2, -1))
    rows.copy_(flat.view(rows.shape))
    return out
