"""The control channel between a job and its training workers: events flow out; stop, resize and pool requests flow in.

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

POLL_SECONDS = 0.3


class ControlChannel:
    """Queues events for the job and requests for the workers; one actor on the job's node."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False
        self._resize_proposed = self._restart_allowed = self._restarting = False
        self._pools: list[bytes] = []
        self._pool_in_use = False  # workers fill the newest pool, or cluster its features

    def publish(self, event: Event) -> None:
        self._events.append(event)
        if isinstance(event, Progress) and event.phase == "training":
            self._pool_in_use = False

    def drain(self, stop: bool) -> tuple[list[Event], int]:
        """The events since the last call, and the number of pools. stop: whether the job was asked to stop."""
        self._stopping = stop
        events, self._events = self._events, []
        return events, len(self._pools)

    def stopping(self) -> bool:
        return self._stopping

    def propose(self, size: int) -> bool:
        """The scaling policy wants to restart the group with `size` workers; returns whether the workers allow it."""
        self._resize_proposed = True
        self._restarting |= self._restart_allowed
        return self._restart_allowed

    def withdraw(self) -> None:
        """The scaling policy no longer wants to resize."""
        self._resize_proposed = self._restart_allowed = self._restarting = False

    def proposed(self) -> bool:
        return self._resize_proposed

    def allow_restart(self, ready: bool) -> bool:
        """Allow a restart, or revoke it; returns whether that succeeded: a restart that has begun is not revoked."""
        self._restart_allowed = ready or self._restarting
        return self._restart_allowed == ready

    def set_pool(self, actors: bytes, unless_in_use: bool = False) -> bool:
        """Make these actors the newest feature pool; returns whether it was done.

        actors: pickled, since unpickling handles imports their classes, and these torch. unless_in_use: not while
        workers fill the pool they asked for, or cluster its features.
        """
        if unless_in_use and self._pool_in_use:
            return False
        self._pools.append(actors)
        return True

    def pool(self, number: int) -> bytes:
        return self._pools[number - 1]

    def newest_pool(self) -> int:
        """The number of the newest pool, which is in use from now on until the workers train again."""
        self._pool_in_use = True
        return len(self._pools)


def open_channel() -> ActorHandle:
    """A channel owned by the caller, on the caller's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(ControlChannel)
    actor: ActorHandle = remote.options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote()
    return actor


class WorkerClient:
    """A worker's side of the channel."""

    def __init__(self, channel: ActorHandle) -> None:
        self._channel = channel
        self._published_at, self._phase = 0.0, ""

    def publish(self, event: Event) -> None:
        """Send an event to the job; Progress is limited to a few events a second."""
        if isinstance(event, Progress):
            if event.phase == self._phase and time.monotonic() - self._published_at < POLL_SECONDS:
                return
            self._published_at, self._phase = time.monotonic(), event.phase
        self._channel.publish.remote(event)

    def stopping(self) -> bool:
        return bool(self._ask(self._channel.stopping))

    def resize_wanted(self) -> bool:
        """Whether the scaling policy wants to restart the group with another number of workers."""
        return bool(self._ask(self._channel.proposed))

    def allow_restart(self, ready: bool) -> bool:
        """Allow a restart, since everything is saved, or revoke it; False: the restart has begun."""
        return self._ask(self._channel.allow_restart, ready) is not False

    def newest_pool(self) -> int:
        """The number of the newest feature pool, 0 if none is known."""
        return int(self._ask(self._channel.newest_pool) or 0)

    def pool(self, number: int) -> list[ActorHandle]:
        """The actors of a pool; every worker must ask for the same number."""
        found: list[ActorHandle] = cloudpickle.loads(ray.get(self._channel.pool.remote(number)))
        return found

    def _ask(self, method: Any, *args: Any) -> Any:
        try:
            return ray.get(method.remote(*args))
        except RayActorError:  # the channel is being restarted
            return None
