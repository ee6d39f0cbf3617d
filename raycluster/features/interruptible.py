"""A feature matrix whose operations raise when the run is asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from raycluster.features.matrix import add
from raycluster.types import Features, RunStopped

T = TypeVar("T")


class Interruptible:
    """Features whose operations raise RunStopped once `stopping()` is true: an algorithm ends between two passes."""

    def __init__(self, features: Features, stopping: Callable[[], bool]) -> None:
        self._features, self._stopping = features, stopping
        self.num_rows, self.dim, self.memory_budget = features.num_rows, features.dim, features.memory_budget

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = add) -> T:
        return self._checked().fold(function, *args, combine=combine)

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> Features:
        return Interruptible(self._checked().map(function, *args), self._stopping)

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        return self._checked().collect(function, *args)

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        return self._checked().map_jobs(function, jobs)

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._checked().rows(samples)

    def _checked(self) -> Features:
        if self._stopping():
            raise RunStopped("stopped while clustering; the same command resumes from the latest checkpoint")
        return self._features
