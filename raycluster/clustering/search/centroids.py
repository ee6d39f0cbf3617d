"""Centroids prepared for a search, once for many blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycluster.clustering.search import int8_cpu
from raycluster.clustering.search.bounds import (
    INFLATE,
    MAX_DIM,
    ROUNDING,
    distance_error,
    int8_bounds_hold,
    score_error,
)

# Squares of residuals below this scale would underflow; each counts as 2^-7 of the scale.
_SMALLEST = 2.0**-67
_VANISHED = 2.0**-7
_CLUSTERS = 64


class QuantizedRows(NamedTuple):
    """Vectors v as 8-bit integers. values: (n, D) int8. scales, norms, errors: (n,) with |v| <= norms and
    |v - scales values| <= errors.
    """

    values: torch.Tensor
    scales: torch.Tensor
    norms: torch.Tensor
    errors: torch.Tensor


@dataclass(frozen=True, eq=False)
class PreparedCentroids:
    """Centroids prepared for a search, lazily. Distances are taken about their mean, where float32 cancels least.

    centroids: (K, D) float32. moved: (m,) which of them moved since the last assignment; None if unknown.
    """

    centroids: NDArray[np.float32]
    moved: NDArray[np.int64] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedCentroids, (self.centroids, self.moved)  # the rest is cheaper to compute than to send

    @cached_property
    def moved_centroids(self) -> PreparedCentroids:
        """Prepared centroids that moved."""
        return PreparedCentroids(self.centroids[self.moved])

    @cached_property
    def centre(self) -> NDArray[np.float32]:
        """(D,) their mean."""
        mean: NDArray[np.float32] = self.centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    @cached_property
    def _squares(self) -> NDArray[np.float64]:
        squares = np.empty(len(self.centroids))
        for start in range(0, len(squares), _CLUSTERS):
            part = slice(start, start + _CLUSTERS)
            squares[part] = np.square(self.centroids[part] - self.centre, dtype=np.float64).sum(axis=1)
        return squares

    @cached_property
    def offsets(self) -> torch.Tensor:
        """(K,) -|centroids - centre|^2 / 2."""
        return torch.from_numpy((-self._squares / 2).astype(np.float32))

    @cached_property
    def max_norm(self) -> float:
        """The largest norm of centroids - centre."""
        return float(np.sqrt(self._squares.max()))

    @property
    def fit_int8(self) -> bool:
        """Whether the error bounds of 8-bit products hold for these centroids."""
        return int8_bounds_hold(self.max_norm, len(self.centre))

    def score_error(self, norms: torch.Tensor) -> torch.Tensor:
        """How far two float32 scores of a row may be off together. norms: of rows about the centre, any shape."""
        return score_error(norms, self.max_norm, len(self.centre))

    def distance_error(self, norms: NDArray[np.floating]) -> NDArray[np.floating]:
        """How far two float32 squared distances of a row may be off together. norms: (n,) of rows about the centre."""
        return distance_error(norms, self.max_norm, len(self.centre))

    @cached_property
    def packed(self) -> int8_cpu.PackedCentroids | None:
        """Centroids as the compiled kernel reads them; None without a kernel or where its error bounds do not hold."""
        instructions, dim = int8_cpu.support(), self.centroids.shape[1]
        if instructions is None or dim > MAX_DIM:
            return None
        packed = int8_cpu.pack(self.centroids, self.centre, instructions)
        exact = not packed.max_norm  # all are equal to the centre
        return packed if exact or int8_bounds_hold(packed.max_norm, dim) else None

    @cached_property
    def centred(self) -> torch.Tensor:
        """(K, D) centroids - centre."""
        return torch.from_numpy(self.centroids - self.centre)

    @cached_property
    def quantized(self) -> QuantizedRows:
        """(K, D) centred centroids in 8 bits."""
        starts = range(0, len(self.centroids), _CLUSTERS)
        found = [quantize_rows(torch.from_numpy(self.centroids[at : at + _CLUSTERS] - self.centre)) for at in starts]
        return QuantizedRows(*map(torch.cat, zip(*found, strict=True)))

    @cached_property
    def device_cache(self) -> dict[torch.device, Any]:
        """Copies that a search keeps on other devices."""
        return {}


def prepare(centroids: NDArray[np.floating], moved: NDArray[np.int64] | None = None) -> PreparedCentroids:
    """Prepare (K, D) centroids; moved: as in `PreparedCentroids`."""
    return PreparedCentroids(np.ascontiguousarray(centroids, np.float32), moved)


def quantize_rows(
    rows: torch.Tensor, scratch: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
) -> QuantizedRows:
    """Round (n, D) float32 rows to 8 bits, each with its own scale. scratch: two buffers of that shape, or None."""
    scales = (torch.abs(rows, out=scratch[0]).amax(dim=1) / 127).clamp_min_(_SMALLEST)
    whole = torch.div(rows, scales[:, None], out=scratch[0]).round_()
    vanished = scales * (_VANISHED * rows.shape[1] ** 0.5)
    norms = torch.linalg.vector_norm(rows, dim=1) * INFLATE + vanished
    left = torch.addcmul(rows, whole, scales[:, None], value=-1, out=scratch[1])
    misses = torch.linalg.vector_norm(left, dim=1) * INFLATE
    return QuantizedRows(whole.to(torch.int8), scales, norms, misses + norms * ROUNDING + vanished)
