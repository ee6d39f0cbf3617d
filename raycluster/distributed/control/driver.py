"""The job's end of the line: shows what workers tell, passes on the wish to stop, lets the pool follow the cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from raycluster.distributed.control.channel import SECONDS_BETWEEN_LOOKS
from raycluster.distributed.control.stall_detector import StallDetector
from raycluster.distributed.features.pool_manager import FeaturePoolManager
from raycluster.distributed.session import stop_requested
from raycluster.events import Event, FailureEvent, Processes, Progress, Started, StatusNote

SECONDS_BETWEEN_ADAPTATIONS = 3.0


@contextmanager
def listen(
    channel: ActorHandle,
    handle: Callable[[Event], None],
    pool_manager: FeaturePoolManager,
    stall_detector: StallDetector,
) -> Iterator[None]:
    """Meanwhile, show what the workers tell, tell them of the wish to stop, and let the pool follow the cluster."""
    listener = DriverListener(channel, handle, pool_manager, stall_detector)
    thread = threading.Thread(target=listener.run, name="line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.over.set()
        thread.join()


class DriverListener:
    """Drains the channel in a thread of the job, and answers what the workers wait for."""

    def __init__(
        self,
        channel: ActorHandle,
        handle: Callable[[Event], None],
        pool_manager: FeaturePoolManager,
        stall_detector: StallDetector,
    ) -> None:
        self._channel, self._handle, self._pool_manager, self._stall_detector = (
            channel,
            handle,
            pool_manager,
            stall_detector,
        )
        self.over = threading.Event()
        self._phase, self._workers, self._adapted_at = "starting", 0, float("-inf")
        self._pool_trimmed = True  # the pool, since the last features were needed
        self._processes: tuple[str, ...] = ()

    def run(self) -> None:
        while True:
            last = self.over.wait(SECONDS_BETWEEN_LOOKS)
            try:
                events, num_pools = ray.get(self._channel.drain.remote(stop_requested()), timeout=10)
            except (RayActorError, GetTimeoutError):
                events, num_pools = [], -1
            for event in events:
                self._handle_event(event)
            if not last and num_pools >= 0 and time.monotonic() - self._adapted_at > SECONDS_BETWEEN_ADAPTATIONS:
                self._adapt_pool(num_pools)
            notice = self._stall_detector.check()
            if notice is not None:
                self._handle(StatusNote(notice))
            if last:
                return

    def _handle_event(self, event: Event) -> None:
        if isinstance(event, Started):
            self._workers = event.num_workers
        elif isinstance(event, FailureEvent) and not event.shards:
            self._workers = 0
        elif isinstance(event, Progress):
            self._phase = event.phase
            self._pool_trimmed = self._pool_trimmed and event.phase == "training"
        self._stall_detector.record_activity(self._phase, self._workers)
        self._handle(event)

    def _adapt_pool(self, num_pools: int) -> None:
        idle = self._phase == "training" and self._workers > 0 and not self._pool_trimmed
        try:
            if idle:
                self._pool_manager.shrink(lambda actors: self._set_pool(actors, unless_in_use=True))
                self._pool_trimmed = True
            if self._pool_manager.grow() or not num_pools:
                self._set_pool(self._pool_manager.actors)
            processes = self._pool_manager.processes()
        except (RayError, OSError):  # a moment of trouble on the head; it is tried again
            return
        finally:
            self._adapted_at = time.monotonic()
        if processes != self._processes:
            self._processes = processes
            self._handle(Processes("features", processes))

    def _set_pool(self, actors: list[ActorHandle], *, unless_in_use: bool = False) -> bool:
        return bool(ray.get(self._channel.set_pool.remote(cloudpickle.dumps(actors), unless_in_use), timeout=10))
