"""The elastic workers: Ray Data streams to them, the actor pool keeps their features, torch adds their sums."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import nn

from raycluster.distributed.control.channel import SECONDS_BETWEEN_LOOKS, WorkerClient
from raycluster.distributed.features.feature_pool import FeaturePoolClient
from raycluster.distributed.ingest import stream
from raycluster.distributed.session import stop_requested
from raycluster.features.matrix import device
from raycluster.runtime.workers import PendingChange
from raycluster.types import Block, Chunk, Features, ImageBlock, Loader

SECONDS_WITHOUT_DEADLINE = 120.0  # after a notice that names none; Ray Train waits as long

T = TypeVar("T")


class RayWorkers:
    """One of `size` processes that share the work, as `raycluster.workers.Workers`.

    With size > 1 torch's process group must exist, as it does inside Ray Train.
    """

    decode_cpus = 0  # that decoding may ask an autoscaler for, all workers together; at least those that are there

    def __init__(
        self,
        pool: FeaturePoolClient,
        *,
        rank: int = 0,
        size: int = 1,
        worker_client: WorkerClient | None = None,
        retry_seconds: float = 0.0,
    ) -> None:
        self.rank, self.size = rank, size
        self.stopping = worker_client.stopping if worker_client else stop_requested
        self.device = device()
        self._noticed_at: float | None = None
        self._pool, self._client, self._retry_seconds = pool, worker_client, retry_seconds
        # Waits for slow phases on one worker (k-means) pass through this group; the default one would time out.
        self._control: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if self.size > 1 else None

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.rank :: self.size]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        if self.size > 1:
            dist.all_reduce(tensor)

    def all_gather(self, items: list[T]) -> list[T]:
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items, group=self._control)
        return [item for part in parts for item in part]

    def run_on_rank_zero(self, function: Callable[..., T], *args: Any) -> T:
        if self.size == 1:
            return function(*args)
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome = [function(*args), None]
            except Exception as error:
                outcome = [None, _portable(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def wrap_ddp(self, network: nn.Module) -> nn.Module:
        if self.size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        # Without a limit Ray Data would ask an autoscaler for ever more, and one that cannot bring all brings nothing.
        cpus = max(ray.cluster_resources().get("CPU", 1.0), self.decode_cpus) / self.size
        return stream(chunks, load, cpus=cpus, retry_seconds=self._retry_seconds)

    def put(self, version: str, shard: int, block: Block) -> None:
        self._pool.put(version, shard, block)

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        self._pool.flush()
        if self._client is not None:
            number = self.run_on_rank_zero(self._client.newest_pool)
            if number:
                self._pool.actors = self._client.pool(number)
        if self._control is not None:
            dist.barrier(group=self._control)
        return self.run_on_rank_zero(self._pool.missing, version, shards)

    def features(self, version: str) -> Features:
        return self._pool.features(version)

    def pending_change(self) -> PendingChange:
        if self._client is None:
            return PendingChange()
        notice = ray.train.get_preemption_info()
        if notice is None:
            self._noticed_at = None
            return PendingChange(None, self.rank == 0 and self._client.resize_wanted())
        self._noticed_at = self._noticed_at or time.time()
        deadline = notice.deadline_ms / 1000 if notice.deadline_ms else self._noticed_at + SECONDS_WITHOUT_DEADLINE
        return PendingChange(max(0.0, deadline - time.time()))

    def wait_for_restart(self, seconds: float) -> None:
        self.run_on_rank_zero(self._wait_until_restarted, seconds)

    def _wait_until_restarted(self, seconds: float) -> None:
        assert self._client is not None
        proposed = self._client.resize_wanted()
        self._client.allow_restart(True)
        until = time.monotonic() + seconds
        while not self.stopping() and not (proposed and not self._client.resize_wanted()):
            if time.monotonic() > until and self._client.allow_restart(False):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._client.allow_restart(False)


def _portable(error: Exception) -> Exception:
    try:
        pickle.dumps(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
