"""The sums of one optimiser step over its microbatches in one vector, and sums of such vectors in any order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from raycluster.types import UserError

_GRADIENT_BITS = 44  # a gradient is kept to 2^-44 = 6e-14
_OTHER_BITS = 32  # statistics may be larger: kept to 2e-10, far below the eps of batch norm
_PIECE = 2**20  # values converted at once, so that large networks need no second vector of integers


class Sums:
    """A float32 vector of [gradients | batch norm statistics | figures].

    The parameters' `grad` are views of it, so that the backward pass adds to it. statistics: (2, C) per batch norm
    layer.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], widths: Sequence[int], *, num_figures: int) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.parameters]
        self.num_gradients = sum(sizes)
        total = self.num_gradients + 2 * sum(widths) + num_figures
        self.values = torch.zeros(total, device=self.parameters[0].device)
        self.gradients, self.others = self.values.split([self.num_gradients, total - self.num_gradients])
        self._statistics = self.others[: 2 * sum(widths)]
        self.statistics = [part.view(2, -1) for part in self._statistics.split([2 * width for width in widths])]
        self.figures = self.others[2 * sum(widths) :]
        self._views = [
            part.as_strided(parameter.shape, parameter.stride())
            for parameter, part in zip(self.parameters, self.gradients.split(sizes), strict=True)
        ]

    def clear(self) -> None:
        """Zero everything, and make the parameters' `grad` views of this vector."""
        self.values.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view

    def add(self, statistics: Sequence[Tensor], figures: Tensor) -> None:
        """Add the (2, C) statistics of each layer and the figures of one forward pass."""
        self.others += torch.cat([*(part.reshape(-1) for part in statistics), figures])


class FixedPoint:
    """Sum of float32 vectors in 64-bit integers: associative, so bitwise identical in any order and grouping.

    Values are truncated to multiples of 2^-44 (the first `num_gradients`) and 2^-32 (the others). Vectors with a value
    that is NaN, or so large that a sum of `num_terms` might overflow, are counted and reported by `mean_into`.
    """

    def __init__(self, sums: Sums, num_terms: int) -> None:
        self.num_terms = num_terms
        self.total = torch.zeros(len(sums.values) + 1, dtype=torch.int64, device=sums.values.device)
        self._limit = 2.0 ** (62 - _GRADIENT_BITS) / num_terms

    def clear(self) -> None:
        """Start a new sum."""
        self.total.zero_()

    def add(self, sums: Sums) -> None:
        """Add one vector."""
        gradients, others = self.total[:-1].split([len(sums.gradients), len(sums.others)])
        for values, total, bits in ((sums.gradients, gradients, _GRADIENT_BITS), (sums.others, others, _OTHER_BITS)):
            for piece, into in zip(values.split(_PIECE), total.split(_PIECE), strict=True):
                into += (piece * 2.0**bits).to(torch.int64)
        self.total[-1] += ~self._fits(sums)

    def _fits(self, sums: Sums) -> Tensor:
        fits = torch.ones((), dtype=torch.bool, device=sums.values.device)
        for values, bits in ((sums.gradients, _GRADIENT_BITS), (sums.others, _OTHER_BITS)):
            least, largest = torch.aminmax(values)  # NaN if any value is, and comparisons with NaN are false
            limit = self._limit * 2.0 ** (_GRADIENT_BITS - bits)
            fits = fits & (-limit < least) & (largest < limit)
        return fits

    def mean_into(self, sums: Sums) -> None:
        """Write total / num_terms. Raises UserError, on every worker, if a vector was out of range."""
        if bad := int(self.total[-1]):
            raise UserError(
                f"training diverged: in {bad} of {self.num_terms} microbatches a gradient was NaN or larger "
                f"than {self._limit:.0f}. Lower training.lr, or set training.warmup_epochs"
            )
        sums.values.copy_(self.total[:-1])
        sums.gradients.mul_(2.0**-_GRADIENT_BITS / self.num_terms)
        sums.others.mul_(2.0**-_OTHER_BITS / self.num_terms)
