"""The machines as the algorithms see them: a few operations that mean the same on one worker or on sixty-four.

Every worker calls the same methods in the same order (SPMD). `LocalWorkers` is the whole protocol in one process
without Ray; `distributed/` holds the elastic one. No result may depend on which of them is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from raycluster.features import Features, LocalFeatures
from raycluster.types import Block, Chunk, ImageBlock, Loader

T = TypeVar("T")


class LostBlocks(Exception):
    """Feature blocks went away with the machine that held them; ask `missing` which, and extract them again."""


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
