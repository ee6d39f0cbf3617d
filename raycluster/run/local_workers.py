"""One worker, in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from raycluster.features.matrix import LocalFeatures
from raycluster.runtime.workers import PendingChange
from raycluster.types import Block, Chunk, Features, ImageBlock, Loader

T = TypeVar("T")


class LocalWorkers:
    """`runtime.workers.Workers` for a single process."""

    def __init__(self, device: str | torch.device = "cpu", stopping: Callable[[], bool] = lambda: False) -> None:
        self.device = torch.device(device)
        self.stopping = stopping
        self._version = ""
        self._blocks: dict[int, Block] = {}

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def all_gather(self, items: list[T]) -> list[T]:
        return items

    def run_on_rank_zero(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    def wrap_ddp(self, network: nn.Module) -> nn.Module:
        return network

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        for chunk in chunks:
            yield from load(chunk)

    def put(self, version: str, shard: int, block: Block) -> None:
        if version != self._version:
            self._version, self._blocks = version, {}
        self._blocks[shard] = block

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        stored = self._blocks if version == self._version else {}
        return [shard for shard in shards if shard not in stored]

    def features(self, version: str) -> Features:
        assert version == self._version, f"features of {version} asked for, {self._version} stored"
        return LocalFeatures([self._blocks[shard] for shard in sorted(self._blocks)])

    def pending_change(self) -> PendingChange:
        return PendingChange()

    def wait_for_restart(self, seconds: float) -> None:
        pass
