"""The pool of actors that store the feature blocks and fold over them; only sums, labels and selected rows leave it."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, ObjectLostError, OwnerDiedError, RayActorError

from raycluster.distributed.features import work_stealing
from raycluster.events import this_process
from raycluster.features.matrix import LocalFeatures, add
from raycluster.runtime.workers import FeatureBlocksLost
from raycluster.types import Block, Features

T = TypeVar("T")
IN_FLIGHT = 8  # blocks that a worker may be sending to the pool
_FAN_IN = 4  # sums added in one task
_TRIES = 5  # losses in one operation that are repaired

Restore = Callable[[ActorHandle, list[int]], None]
"""Sends the blocks of these shards to a restarted actor again."""


class _StoredBlocks(Sequence[Block]):
    """Blocks in the object store, read on access without a copy."""

    def __init__(self, refs: list[ray.ObjectRef]) -> None:
        self.refs = refs

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: Any) -> Any:
        return ray.get(self.refs[index])


class FeatureStore:
    """An actor that owns the blocks of some shards, by version; they are lost with it, and `have` shows which.

    Blocks are in the object store, which Ray spills to disk when it is full. During an operation the process holds one
    sum (for k-means 8 K D bytes, at most 32 MB), the centroids (at most 9 K D bytes), the labels of its rows (4 bytes
    each), and a few MB of tiles per thread.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, dict[int, ray.ObjectRef]] = {}
        self.sums: dict[str, tuple[int, Any]] = {}
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the training workers use the GPUs
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def add(self, version: str, shard: int, block: Block) -> None:
        self.blocks.setdefault(version, {})[shard] = ray.put(block)

    def take(self, version: str, shard: int, first: int, values: NDArray[Any], start: int, stop: int) -> None:
        """Store values[start:stop] of an object in the object store; their sample ids are first, first + 1..."""
        chosen = values[start:stop]
        matrix: NDArray[Any] = np.stack(list(chosen)) if chosen.dtype == object else chosen
        floats = matrix if matrix.dtype in (np.float16, np.float32) else matrix.astype(np.float32)
        self.add(version, shard, Block(np.arange(first, first + len(floats)), floats))

    def pid(self) -> int:
        return os.getpid()

    def place(self) -> tuple[str, str]:
        """(node id, "host:pid")."""
        return ray.get_runtime_context().get_node_id(), this_process()

    def have(self, version: str) -> list[int]:
        """The shards of `version`. Other versions are dropped: features of different weights are never mixed."""
        self.blocks = {version: self.blocks.get(version, {})}
        return sorted(self.blocks[version])

    def size(self, version: str) -> tuple[list[int], list[int], int]:
        """(shards, rows of each, width)."""
        shards = sorted(self.blocks.get(version, {}))
        shapes = [ray.get(self.blocks[version][shard]).values.shape for shard in shards]
        return shards, [shape[0] for shape in shapes], max((shape[1] for shape in shapes), default=0)

    def places(self, version: str, shards: list[int]) -> dict[int, ray.ObjectRef]:
        self._require(version, shards)
        return {shard: self.blocks[version][shard] for shard in shards}

    def work(
        self, job: str, version: str, shards: list[int], taken: list[ray.ObjectRef], call: tuple[Any, ...]
    ) -> None:
        """Fold over blocks of its own, or over `taken` ones, and add to the sum of `job`; see `work_stealing.fold`."""
        function, args, combine = call
        features = LocalFeatures(ray.get(taken)) if taken else self._local(version, shards)
        found = features.fold(function, *args, combine=combine)
        count, total = self.sums.get(job, (0, None))
        self.sums[job] = count + 1, combine(total, found) if count else found

    def finish(self, job: str, times: int) -> Any:
        """The sum of `times` calls of `work`; raises FeatureBlocksLost if this actor has made fewer."""
        count, total = self.sums.pop(job, (0, None))
        if count != times:
            raise FeatureBlocksLost("this actor was restarted in the middle of an operation")
        return total

    def discard(self, job: str) -> None:
        """Free the sum of a job that failed elsewhere."""
        self.sums.pop(job, None)

    def solve(self, blocks: list[ray.ObjectRef], function: Callable[..., T], job: tuple[Any, ...]) -> T:
        """Solve one problem on blocks that other actors may own."""
        return function(LocalFeatures(_StoredBlocks(blocks)), *job)

    def collect(self, version: str, shards: list[int], call: tuple[Any, ...]) -> list[Any]:
        function, args = call
        return self._local(version, shards).collect(function, *args)

    def map(self, version: str, shards: list[int], call: tuple[Any, ...]) -> None:
        target, function, args = call
        self._require(version, shards)
        for shard in shards:
            block = ray.get(self.blocks[version][shard])
            self.add(target, shard, Block(block.samples, function(block, *args)))

    def _require(self, version: str, shards: list[int]) -> None:
        if not set(shards) <= set(self.blocks.get(version, {})):
            raise FeatureBlocksLost(f"this actor was restarted and lost its blocks of {version}")

    def _local(self, version: str, shards: list[int]) -> LocalFeatures:
        self._require(version, shards)
        return LocalFeatures(ray.get([self.blocks[version][shard] for shard in shards]))


@contextmanager
def _losses_raised() -> Iterator[None]:
    try:
        yield
    except (RayActorError, ActorUnavailableError, ObjectLostError, OwnerDiedError) as error:
        raise FeatureBlocksLost(str(error).splitlines()[0]) from None


class PooledFeatures:
    """The rows of one version in a pool: a Features that computes where the rows are.

    With `restore`, an operation during which an actor dies is repeated after its blocks are restored; without, it
    raises FeatureBlocksLost.
    """

    memory_budget = 32 * 2**20  # large, since every fold costs a round of messages

    def __init__(self, actors: Sequence[ActorHandle], version: str, restore: Restore | None = None) -> None:
        self.actors, self.version, self.restore = actors, version, restore
        with _losses_raised():
            sizes = ray.get([actor.size.remote(version) for actor in actors])
        self.shards = [shards for shards, _, _ in sizes]
        self.filled = [[shard for shard, count in zip(*one[:2], strict=True) if count] for one in sizes]
        self.num_rows = sum(sum(rows) for _, rows, _ in sizes)
        self.dim = max(dim for _, _, dim in sizes)

    def fold(self, function: Callable[..., T], *args: Any, combine: Callable[[T, T], T] = add) -> T:
        return self._with_restore(lambda: self._fold((function, args, combine)))

    def _fold(self, call: tuple[Any, ...]) -> Any:
        """Sums are added a few at a time, on any node, so that no process ever holds those of all actors."""
        with _losses_raised():
            parts = work_stealing.fold(self.actors, self.version, self.filled, ray.put(call))
            while len(parts) > _FAN_IN:
                groups = [parts[start : start + _FAN_IN] for start in range(0, len(parts), _FAN_IN)]
                parts = [_combined.remote(call[2], *group) for group in groups]
            return reduce(call[2], ray.get(parts))

    def map(self, function: Callable[..., NDArray[np.floating]], *args: Any) -> Features:
        target = f"{self.version}|{function.__name__}"
        call = (target, function, args)
        self._call("map", call)
        if self.restore is None:
            return PooledFeatures(self.actors, target)

        def map_again(actor: ActorHandle, shards: list[int]) -> None:
            self.restore_blocks()
            ray.get(actor.map.remote(self.version, shards, call))

        return PooledFeatures(self.actors, target, map_again)

    def map_jobs(self, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
        def solve() -> list[T]:
            with _losses_raised():
                return work_stealing.map_jobs(self.actors, self.version, self.filled, (function, jobs))

        return self._with_restore(solve)

    def collect(self, function: Callable[..., T], *args: Any) -> list[T]:
        parts = self._call("collect", (function, args))
        order = np.argsort(np.concatenate([shards for shards in self.shards if shards]), kind="stable")
        flat = reduce(operator.add, parts)
        return [flat[index] for index in order]

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        found = self.collect(_select_rows, samples)
        out = np.empty((len(samples), self.dim), np.float32)
        for places, values in found:
            out[places] = values
        return out

    def _call(self, method: str, call: tuple[Any, ...]) -> list[Any]:
        """The results of the actors that have shards, in the order of the actors."""

        def ask() -> list[Any]:
            with _losses_raised():
                return ray.get(self._ask(method, call))

        return self._with_restore(ask)

    def _ask(self, method: str, call: tuple[Any, ...]) -> list[ray.ObjectRef]:
        shared = ray.put(call)
        return [
            getattr(actor, method).remote(self.version, shards, shared)
            for actor, shards in zip(self.actors, self.shards, strict=True)
            if shards
        ]

    def _with_restore(self, operation: Callable[[], T]) -> T:
        for _ in range(_TRIES if self.restore else 0):
            try:
                return operation()
            except FeatureBlocksLost:
                self.restore_blocks()
        return operation()

    def restore_blocks(self) -> None:
        """Send restarted actors the blocks they have lost."""
        assert self.restore is not None
        for actor, shards in zip(self.actors, self.shards, strict=True):
            missing = sorted(set(shards) - set(_with_retry(actor.size, self.version)[0]))
            if missing:
                with _losses_raised():
                    self.restore(actor, missing)


def _select_rows(block: Block, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(positions in `samples` that are in this block, (n, D) float32 rows)."""
    order = np.argsort(block.samples)
    at = np.searchsorted(block.samples, samples, sorter=order).clip(max=max(len(order) - 1, 0))
    places = np.flatnonzero(block.samples[order[at]] == samples) if len(order) else np.empty(0, np.int64)
    return places, block.values[order[at[places]]].astype(np.float32)


class FeaturePoolClient:
    """A worker's side of the pool: sends blocks, and finds which are missing."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self.actors = actors
        self._sent: list[ray.ObjectRef] = []

    def put(self, version: str, shard: int, block: Block) -> None:
        self._sent.append(self.actors[shard % len(self.actors)].add.remote(version, shard, block))
        if len(self._sent) >= IN_FLIGHT:
            self._settle(self._sent[: IN_FLIGHT // 2])
            self._sent = self._sent[IN_FLIGHT // 2 :]

    def flush(self) -> None:
        """Wait until every block sent has arrived or is lost."""
        self._settle(self._sent)
        self._sent = []

    def _settle(self, refs: list[ray.ObjectRef]) -> None:
        for ref in refs:
            try:
                ray.get(ref)
            except RayActorError:
                continue  # `missing` will list the shard

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        stored: set[int] = set()
        for actor in self.actors:
            stored |= set(_with_retry(actor.have, version))
        return [shard for shard in shards if shard not in stored]

    def features(self, version: str) -> PooledFeatures:
        return PooledFeatures(self.actors, version)


def _with_retry(method: Any, version: str, *, tries: int = 60) -> Any:
    """The result of an actor method; waits up to about a minute while Ray restarts the actor."""
    for _ in range(tries):
        try:
            return ray.get(method.remote(version))
        except RayActorError:
            time.sleep(1)
    raise FeatureBlocksLost("an actor of the feature pool was not restarted within a minute")


@ray.remote(num_cpus=0)
def _combined(combine: Callable[[T, T], T], *parts: T) -> T:
    return reduce(combine, parts)


def start_pool(name: str, num_actors: int) -> list[ActorHandle]:
    """Named actors spread over the nodes, owned by the caller, restarted without blocks when they die."""
    remote: Any = ray.remote(FeatureStore)
    return [
        remote.options(
            name=f"{name}-{index}", num_cpus=0, max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD"
        ).remote()
        for index in range(num_actors)
    ]
