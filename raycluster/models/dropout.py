"""Dropout with one seed per microbatch, so that masks do not depend on which worker computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raycluster.seeding import seed_for


class SeededDropout(nn.Module):
    """Dropout with one mask per group of rows, drawn from that group's seed.

    (n, ...) -> same shape; the groups are `len(seeds)` equal runs of consecutive rows. index: of the layer, so that
    layers draw different masks. `seeds` must be set before each forward pass in training.
    """

    def __init__(self, index: int, p: float = 0.5) -> None:
        super().__init__()
        self.index, self.p = index, p
        self.seeds: Sequence[int] = ()

    def forward(self, values: Tensor) -> Tensor:
        """(n, ...) -> same shape. Raises ValueError if, in training, n is not a multiple of `len(seeds)`."""
        if not self.training:
            return values
        if not self.seeds or len(values) % len(self.seeds):
            raise ValueError(
                f"{len(values)} rows cannot be masked with {len(self.seeds)} seeds: set one per microbatch"
            )
        mask = torch.empty(values.shape, device=values.device, dtype=values.dtype)
        for part, seed in zip(mask.chunk(len(self.seeds)), self.seeds, strict=True):
            generator = torch.Generator(values.device).manual_seed(seed_for(seed, "dropout", self.index))
            part.bernoulli_(1 - self.p, generator=generator)
        return values * mask.mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Settings shown by `repr`."""
        return f"p={self.p}, index={self.index}"
