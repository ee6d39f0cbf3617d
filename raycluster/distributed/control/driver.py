"""The job's side of the control channel: shows events, forwards the request to stop, adapts the feature pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from raycluster.distributed.control.channel import POLL_SECONDS
from raycluster.distributed.control.stall_detector import StallDetector
from raycluster.distributed.features.pool_manager import FeaturePoolManager
from raycluster.distributed.session import request_stop, stop_requested
from raycluster.events import Event, FailureEvent, Processes, Progress, Started, StatusNote

ADAPT_SECONDS = 3.0
_ANSWER_SECONDS = 10


@contextmanager
def listen(
    channel: ActorHandle,
    handle: Callable[[Event], None],
    pool_manager: FeaturePoolManager,
    stall_detector: StallDetector,
) -> Iterator[None]:
    """Run a DriverListener in a thread. Raises its first exception at the end, if the body raised none."""
    listener = DriverListener(channel, handle, pool_manager, stall_detector)
    thread = threading.Thread(target=listener.run, name="driver-listener", daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.closing.set()
        thread.join()
    if listener.error is not None:
        raise listener.error


class DriverListener:
    """Drains the channel until `closing` is set, once more after that.

    An exception, such as that of a handler whose output is closed, asks the run to save and stop; `error` keeps the
    first one. The listener keeps running, since workers learn only through the channel that they must stop.
    """

    def __init__(
        self,
        channel: ActorHandle,
        handle: Callable[[Event], None],
        pool_manager: FeaturePoolManager,
        stall_detector: StallDetector,
    ) -> None:
        self._channel, self._handle = channel, handle
        self._pool_manager, self._stall_detector = pool_manager, stall_detector
        self.closing = threading.Event()
        self.error: Exception | None = None
        self._phase, self._num_workers, self._adapted_at = "starting", 0, float("-inf")
        self._pool_trimmed = True  # since features were last needed
        self._processes: tuple[str, ...] = ()

    def run(self) -> None:
        closing = False
        while not closing:
            closing = self.closing.wait(POLL_SECONDS)
            try:
                events, num_pools = ray.get(self._channel.drain.remote(stop_requested()), timeout=_ANSWER_SECONDS)
            except (RayActorError, GetTimeoutError):
                events, num_pools = [], -1
            except Exception as error:
                self._fail(error)
                continue
            self._serve(events, -1 if closing else num_pools)

    def _serve(self, events: list[Event], num_pools: int) -> None:
        """num_pools: that the channel knows, -1 to leave the pool alone."""
        for event in events:
            try:
                self._handle_event(event)
            except Exception as error:  # a handler may raise anything, and must not keep the others from the events
                self._fail(error)
        try:
            if num_pools >= 0 and time.monotonic() - self._adapted_at > ADAPT_SECONDS:
                self._adapt_pool(num_pools)
            notice = self._stall_detector.check()
            if notice is not None:
                self._handle(StatusNote(notice))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            if not stop_requested():  # an earlier request may have a reason
                request_stop("")

    def _handle_event(self, event: Event) -> None:
        if isinstance(event, Started):
            self._num_workers = event.num_workers
        elif isinstance(event, FailureEvent) and not event.shards:
            self._num_workers = 0
        elif isinstance(event, Progress):
            self._phase = event.phase
            self._pool_trimmed = self._pool_trimmed and event.phase == "training"
        self._stall_detector.record_activity(self._phase, self._num_workers)
        self._handle(event)

    def _adapt_pool(self, num_pools: int) -> None:
        idle = self._phase == "training" and self._num_workers > 0 and not self._pool_trimmed
        try:
            if idle:
                self._pool_manager.shrink(lambda actors: self._set_pool(actors, unless_in_use=True))
                self._pool_trimmed = True
            if self._pool_manager.grow() or not num_pools:
                self._set_pool(self._pool_manager.actors)
            processes = self._pool_manager.processes()
        except (RayError, OSError):  # the head is busy or restarting; tried again
            return
        finally:
            self._adapted_at = time.monotonic()
        if processes != self._processes:
            self._processes = processes
            self._handle(Processes("features", processes))

    def _set_pool(self, actors: list[ActorHandle], *, unless_in_use: bool = False) -> bool:
        pickled = cloudpickle.dumps(actors)
        return bool(ray.get(self._channel.set_pool.remote(pickled, unless_in_use), timeout=_ANSWER_SECONDS))
