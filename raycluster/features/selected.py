"""Some rows of a feature matrix as a matrix of their own: operations compute where the rows are, none is moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raycluster.features.matrix import add
from raycluster.types import Block, Features

T = TypeVar("T")


class SelectedRows:
    """The rows of these samples. samples: (n,) int64, at least one, all of which `features` holds."""

    def __init__(self, features: Features, samples: NDArray[np.int64]) -> None:
        self._features, self._samples = features, samples
        chosen = np.zeros(samples.max() + 1, np.bool_)
        chosen[samples] = True
        self._chosen = np.packbits(chosen)  # one bit per sample id: it is sent with every operation
        self.num_rows, self.dim, self.memory_budget = len(samples), features.dim, features.memory_budget

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = add) -> T:
        return self._features.fold(_on_selected, self._chosen, function, args, combine=combine)

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> Features:
        return SelectedRows(self._features.map(function, *args), self._samples)

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        return self._features.collect(_on_selected, self._chosen, function, args)

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        return self._features.map_jobs(_solve_selected, [(self._samples, function, job) for job in jobs])

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._features.rows(samples)


def _on_selected(block: Block, chosen: NDArray[np.uint8], function: Callable[..., T], args: tuple[Any, ...]) -> T:
    byte, bit = block.samples >> 3, 7 - (block.samples & 7)
    known = byte < len(chosen)
    inside = known & ((chosen[np.where(known, byte, 0)] >> bit) & 1).astype(np.bool_)
    rows = block if inside.all() else Block(block.samples[inside], block.values[inside])
    return function(rows, *args)


def _solve_selected(
    features: Features, samples: NDArray[np.int64], function: Callable[..., T], job: tuple[Any, ...]
) -> T:
    return function(SelectedRows(features, samples), *job)
