"""The line between a job and its training workers: what happens comes out, wishes and the pool of actors go in.

The actor imports this module, so it must not import torch: that would cost every run 5 seconds and a gigabyte.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycluster.events import Event, Progress

SECONDS_BETWEEN_LOOKS = 0.3


class ControlChannel:
    """Keeps events until the job hears them, and wishes until the workers ask; one actor on the job's machine."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = self._proposed = self._restart_allowed = self._taken = False
        self._pools: list[bytes] = []
        self._in_use = False  # the pool: somebody fills it, or works with what it holds

    def publish(self, event: Event) -> None:
        self._events.append(event)
        if isinstance(event, Progress) and event.phase == "training":
            self._in_use = False

    def drain(self, stop: bool) -> tuple[list[Event], int]:
        """What happened since the last call, and how many crews are known. stop: the job was asked to stop."""
        self._stopping = stop
        events, self._events = self._events, []
        return events, len(self._pools)

    def stopping(self) -> bool:
        return self._stopping

    def propose(self, size: int) -> bool:
        """Ray wants to start `size` workers instead of those there are; whether these are ready for it."""
        self._proposed = True
        self._taken |= self._restart_allowed
        return self._restart_allowed

    def withdraw(self) -> None:
        """Ray no longer wants to."""
        self._proposed = self._restart_allowed = self._taken = False

    def proposed(self) -> bool:
        return self._proposed

    def allow_restart(self, ready: bool) -> bool:
        """Whether it could be said: leave that Ray has taken cannot be taken back, the workers are about to end."""
        self._restart_allowed = ready or self._taken
        return self._restart_allowed == ready

    def set_pool(self, actors: bytes, unless_in_use: bool = False) -> bool:
        """From now on these are the pool of features; pickled, for handles import their classes, and these torch.

        unless_in_use: not while workers fill the pool they asked for, or work with what it holds. Returns whether.
        """
        if unless_in_use and self._in_use:
            return False
        self._pools.append(actors)
        return True

    def pool(self, number: int) -> bytes:
        return self._pools[number - 1]

    def newest_pool(self) -> int:
        """The number of the pool that whoever asks will use, until they train again."""
        self._in_use = True
        return len(self._pools)


def open_channel() -> ActorHandle:
    """A line owned by the caller, on the caller's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(ControlChannel)
    actor: ActorHandle = remote.options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote()
    return actor


class WorkerClient:
    """A worker's end of the line."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel
        self._last, self._phase = 0.0, ""

    def publish(self, event: Event) -> None:
        """Pass an event on; of progress only a few a second."""
        if isinstance(event, Progress):
            if event.phase == self._phase and time.monotonic() - self._last < SECONDS_BETWEEN_LOOKS:
                return
            self._last, self._phase = time.monotonic(), event.phase
        self._channel.publish.remote(event)

    def stopping(self) -> bool:
        return bool(self._ask(self._channel.stopping))

    def resize_wanted(self) -> bool:
        """Whether Ray wants to start the workers again in another number."""
        return bool(self._ask(self._channel.proposed))

    def allow_restart(self, ready: bool) -> bool:
        """Everything is saved, Ray may do so (or may no longer; False: it is too late for that)."""
        return self._ask(self._channel.allow_restart, ready) is not False

    def newest_pool(self) -> int:
        """The number of the pool that is in office, 0 if none is known."""
        return int(self._ask(self._channel.newest_pool) or 0)

    def pool(self, number: int) -> list[ActorHandle]:
        """The actors of a pool; every worker must ask for the same number."""
        found: list[ActorHandle] = cloudpickle.loads(ray.get(self._channel.pool.remote(number)))
        return found

    def _ask(self, method: Any, *args: Any) -> Any:
        try:
            return ray.get(method.remote(*args))
        except RayActorError:  # it is being restarted
            return None
