"""The machines as algorithms see them: four protocols that mean the same on one worker or on sixty-four.

Every worker calls the same methods in the same order (SPMD). `run.local_workers.LocalWorkers` implements them in one
process without Ray, `distributed.workers.RayWorkers` elastically. No result depends on which of them is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from raycluster.types import Block, Chunk, Features, ImageBlock, Loader

if TYPE_CHECKING:  # tasks that only decode images must not import torch
    import torch
    from torch import nn

T = TypeVar("T")


class FeatureBlocksLost(Exception):
    """Feature blocks were lost with the machine that held them; ask `missing` which, and extract them again."""


@dataclass(frozen=True)
class PendingChange:
    """A change of the worker group that the cluster has announced.

    notice_seconds: until a machine of the group is taken away, None if none will be. resize: the group is about to be
    restarted with another number of workers, as soon as it allows it.
    """

    notice_seconds: float | None = None
    resize: bool = False


class Collectives(Protocol):
    """Collective operations over all workers."""

    device: torch.device

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The part of `items` that this worker takes; the parts of all workers are disjoint and cover everything."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all workers, in place."""

    def all_gather(self, items: list[T]) -> list[T]:
        """The items of all workers, in the order of the workers, on every worker."""

    def run_on_rank_zero(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on one worker; its result, or its exception, reaches all."""

    def wrap_ddp(self, network: nn.Module) -> nn.Module:
        """`network` wrapped so that gradients are averaged over workers during the backward pass."""


class DataStream(Protocol):
    """Decoded images, loaded ahead of their use."""

    def stream(self, chunks: Sequence[Chunk], load: Loader) -> Iterator[ImageBlock]:
        """The blocks of every chunk, loaded ahead in parallel, in the order of the chunks."""


class FeatureStore(Protocol):
    """Where extracted features are kept until labels are assigned from them."""

    def put(self, version: str, shard: int, block: Block) -> None:
        """Store the features of one shard, extracted with the weights that `version` names."""

    def missing(self, version: str, shards: Sequence[int]) -> list[int]:
        """Those of `shards` whose features of this version are not stored; older versions are dropped. Collective."""

    def features(self, version: str) -> Features:
        """The blocks stored under `version`, as one matrix. Its operations raise FeatureBlocksLost when some are."""


class Lifecycle(Protocol):
    """Requests to stop, and changes of the worker group."""

    def stopping(self) -> bool:
        """Whether this worker was asked to stop."""

    def pending_change(self) -> PendingChange:
        """What the cluster has announced. Collective."""

    def wait_for_restart(self, seconds: float) -> None:
        """Everything is saved: wait up to `seconds` for this group of workers to be restarted. Collective."""


class Workers(Collectives, DataStream, FeatureStore, Lifecycle, Protocol):
    """What a run needs of its machines."""
