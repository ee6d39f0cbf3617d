"""The machines as the algorithms see them: a few operations that mean the same on one worker or on sixty-four.

Every worker calls the same methods in the same order (SPMD). `LocalWorkers` is the whole protocol in one process
without Ray; `distributed/` holds the elastic one. No result may depend on which of them is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raycluster.features.matrix import Features, LocalFeatures, add
from raycluster.types import Block, Chunk, ImageBlock, Loader, Stopped

T = TypeVar("T")


class LostBlocks(Exception):
    """Feature blocks went away with the machine that held them; ask `missing` which, and extract them again."""


@dataclass(frozen=True)
class Coming:
    """What the cluster has announced.

    notice_seconds: until a machine of the group goes away, None if none will. resize: the workers are about to be
    started again in another number, as soon as they let go.
    """

    notice_seconds: float | None = None
    resize: bool = False


class Workers(Protocol):
    """What a run needs of its machines."""

    device: torch.device

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of `items` that this worker takes; the parts of all workers are disjoint and cover everything."""

    def add(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all workers, in place."""

    def gather(self, items: list[T]) -> list[T]:
        """The items of all workers, in the order of the workers, on every worker."""

    def once(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on one worker; its result, or its exception, reaches all."""

    def parallel(self, network: nn.Module) -> nn.Module:
        """`network` wrapped so that gradients are averaged over workers during the backward pass."""

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        """The blocks of every chunk, loaded ahead in parallel, in the order of the chunks."""

    def put(self, version: str, shard: int, block: Block) -> None:
        """Hand over the features of one shard, extracted with the weights that `version` names."""

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        """Those of `shards` whose features of this version are not held by anyone; older versions are dropped."""

    def features(self, version: str) -> Features:
        """The blocks put under `version`, as one matrix. Its operations raise LostBlocks when some went away."""

    def stopping(self) -> bool:
        """Whether this worker was asked to stop."""

    def coming(self) -> Coming:
        """What the cluster has announced; collective."""

    def let_go(self, seconds: float) -> None:
        """Everything is saved: wait for the end of this group of workers, at most so long; collective."""


class LocalWorkers:
    """One worker, in this process, without Ray."""

    def __init__(self, device: str | torch.device = "cpu", stopping: Callable[[], bool] = lambda: False) -> None:
        self.device = torch.device(device)
        self.stopping = stopping
        self._version = ""
        self._blocks: dict[int, Block] = {}

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def add(self, tensor: torch.Tensor) -> None:
        pass

    def gather(self, items: list[T]) -> list[T]:
        return items

    def once(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    def parallel(self, network: nn.Module) -> nn.Module:
        return network

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        for chunk in chunks:
            yield from load(chunk)

    def put(self, version: str, shard: int, block: Block) -> None:
        if version != self._version:
            self._version, self._blocks = version, {}
        self._blocks[shard] = block

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        held = self._blocks if version == self._version else {}
        return [shard for shard in shards if shard not in held]

    def features(self, version: str) -> Features:
        assert version == self._version, f"features of {version} asked for, {self._version} held"
        return LocalFeatures([self._blocks[shard] for shard in sorted(self._blocks)])

    def coming(self) -> Coming:
        return Coming()

    def let_go(self, seconds: float) -> None:
        pass


class Interruptible:
    """Features whose operations raise Stopped once somebody asked to stop: between two iterations of any algorithm."""

    def __init__(self, features: Features, stopping: Callable[[], bool]) -> None:
        self._features, self._stopping = features, stopping
        self.num_rows, self.dim, self.room = features.num_rows, features.dim, features.room

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = add) -> T:
        return self._unstopped().fold(function, *args, combine=combine)

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> Features:
        return Interruptible(self._unstopped().map(function, *args), self._stopping)

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        return self._unstopped().collect(function, *args)

    def each(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        return self._unstopped().each(function, jobs)

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._unstopped().rows(samples)

    def _unstopped(self) -> Features:
        if self._stopping():
            raise Stopped("stopped while clustering; the same command goes on from the last checkpoint")
        return self._features
