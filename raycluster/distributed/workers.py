"""The elastic workers: Ray Data streams images, an actor pool stores features, torch.distributed adds and gathers."""

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

from raycluster.distributed.control.channel import POLL_SECONDS, WorkerClient
from raycluster.distributed.features.feature_pool import FeaturePoolClient
from raycluster.distributed.ingest import stream
from raycluster.distributed.session import stop_requested
from raycluster.features.matrix import device
from raycluster.runtime.workers import PendingChange
from raycluster.types import Block, Chunk, Features, ImageBlock, Loader

SECONDS_WITHOUT_DEADLINE = 120.0  # after a preemption notice without a deadline; Ray Train waits as long
CONTROL_TIMEOUT = timedelta(days=7)

T = TypeVar("T")


class ProcessGroup:
    """`runtime.workers.Collectives` over torch.distributed; with size > 1 its default group must exist."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, device()
        # Waits for slow phases on one worker (k-means) use this group; the default one would time out.
        self._control: Any = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if size > 1 else None

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

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            dist.barrier(group=self._control)


class RayDataStream:
    """`runtime.workers.DataStream` on Ray Data.

    num_workers: streams that share the CPUs of the cluster. decode_cpus: CPUs that an autoscaler may be asked for, for
    all workers together; at least those of the cluster are used. retry_seconds: while storage is unreachable.
    """

    def __init__(self, *, num_workers: int = 1, decode_cpus: int = 0, retry_seconds: float = 0.0) -> None:
        self._num_workers, self._decode_cpus, self._retry_seconds = num_workers, decode_cpus, retry_seconds

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        # Without a limit Ray Data requests ever more CPUs, and an infeasible request brings none.
        cpus = max(ray.cluster_resources().get("CPU", 1.0), self._decode_cpus) / self._num_workers
        return stream(chunks, load, cpus=cpus, retry_seconds=self._retry_seconds)


class PoolFeatureStore:
    """`runtime.workers.FeatureStore` on a pool of actors, which the job may replace."""

    def __init__(self, pool: FeaturePoolClient, group: ProcessGroup, client: WorkerClient | None) -> None:
        self._pool, self._group, self._client = pool, group, client

    def put(self, version: str, shard: int, block: Block) -> None:
        self._pool.put(version, shard, block)

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        self._pool.flush()
        if self._client is not None:
            number = self._group.run_on_rank_zero(self._client.newest_pool)
            if number:
                self._pool.actors = self._client.pool(number)
        self._group.barrier()
        return self._group.run_on_rank_zero(self._pool.missing, version, shards)

    def features(self, version: str) -> Features:
        return self._pool.features(version)


class RayLifecycle:
    """`runtime.workers.Lifecycle`: the job's requests and Ray's preemption notices; without a client, signals only."""

    def __init__(self, group: ProcessGroup, client: WorkerClient | None) -> None:
        self._group, self._client = group, client
        self._noticed_at: float | None = None

    def stopping(self) -> bool:
        return self._client.stopping() if self._client else stop_requested()

    def pending_change(self) -> PendingChange:
        if self._client is None:
            return PendingChange()
        notice = ray.train.get_preemption_info()
        if notice is None:
            self._noticed_at = None
            return PendingChange(None, self._group.rank == 0 and self._client.resize_wanted())
        self._noticed_at = self._noticed_at or time.time()
        deadline = notice.deadline_ms / 1000 if notice.deadline_ms else self._noticed_at + SECONDS_WITHOUT_DEADLINE
        return PendingChange(max(0.0, deadline - time.time()))

    def wait_for_restart(self, seconds: float) -> None:
        self._group.run_on_rank_zero(self._wait_for_restart, seconds)

    def _wait_for_restart(self, seconds: float) -> None:
        assert self._client is not None
        proposed = self._client.resize_wanted()
        self._client.allow_restart(True)
        until = time.monotonic() + seconds
        while not self.stopping() and not (proposed and not self._client.resize_wanted()):
            if time.monotonic() > until and self._client.allow_restart(False):
                return
            time.sleep(POLL_SECONDS)
        self._client.allow_restart(False)


class RayWorkers:
    """One of `size` processes that share a run, as `runtime.workers.Workers`: the four parts above.

    worker_client: of the control channel; None in the job's own process. decode_cpus, retry_seconds: of RayDataStream.
    """

    def __init__(
        self,
        pool: FeaturePoolClient,
        *,
        rank: int = 0,
        size: int = 1,
        worker_client: WorkerClient | None = None,
        decode_cpus: int = 0,
        retry_seconds: float = 0.0,
    ) -> None:
        group = ProcessGroup(rank, size)
        store = PoolFeatureStore(pool, group, worker_client)
        lifecycle = RayLifecycle(group, worker_client)
        self.device, self.shard, self.wrap_ddp = group.device, group.shard, group.wrap_ddp
        self.all_reduce, self.all_gather = group.all_reduce, group.all_gather
        self.run_on_rank_zero = group.run_on_rank_zero
        self.stream = RayDataStream(num_workers=size, decode_cpus=decode_cpus, retry_seconds=retry_seconds).stream
        self.put, self.missing, self.features = store.put, store.missing, store.features
        self.stopping, self.pending_change = lifecycle.stopping, lifecycle.pending_change
        self.wait_for_restart = lifecycle.wait_for_restart


def _portable(error: Exception) -> Exception:
    try:
        pickle.dumps(error)
    except Exception:  # whatever an exception holds may refuse to be pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
