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
from raycluster.distributed.control.stall_detector import Watchdog
from raycluster.distributed.features.pool_manager import Crew
from raycluster.distributed.session import stop_requested
from raycluster.events import Event, Lost, Noted, Processes, Progress, Started

SECONDS_BETWEEN_ADAPTATIONS = 3.0


@contextmanager
def listening(line: ActorHandle, see: Callable[[Event], None], crew: Crew, watchdog: Watchdog) -> Iterator[None]:
    """Meanwhile, show what the workers tell, tell them of the wish to stop, and let the pool follow the cluster."""
    listener = _Listener(line, see, crew, watchdog)
    thread = threading.Thread(target=listener.run, name="line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.over.set()
        thread.join()


class _Listener:
    def __init__(self, line: ActorHandle, see: Callable[[Event], None], crew: Crew, watchdog: Watchdog) -> None:
        self._line, self._see, self._crew, self._watchdog = line, see, crew, watchdog
        self.over = threading.Event()
        self._phase, self._workers, self._adapted_at = "starting", 0, float("-inf")
        self._tidied = True  # the pool, since the last features were needed
        self._processes: tuple[str, ...] = ()

    def run(self) -> None:
        while True:
            last = self.over.wait(SECONDS_BETWEEN_LOOKS)
            try:
                events, crews = ray.get(self._line.hear.remote(stop_requested()), timeout=10)
            except (RayActorError, GetTimeoutError):
                events, crews = [], -1
            for event in events:
                self._heard(event)
            if not last and crews >= 0 and time.monotonic() - self._adapted_at > SECONDS_BETWEEN_ADAPTATIONS:
                self._adapt(crews)
            word = self._watchdog.word()
            if word is not None:
                self._see(Noted(word))
            if last:
                return

    def _heard(self, event: Event) -> None:
        if isinstance(event, Started):
            self._workers = event.num_workers
        elif isinstance(event, Lost) and not event.shards:
            self._workers = 0
        elif isinstance(event, Progress):
            self._phase = event.phase
            self._tidied = self._tidied and event.phase == "training"
        self._watchdog.sign(self._phase, self._workers)
        self._see(event)

    def _adapt(self, crews: int) -> None:
        idle = self._phase == "training" and self._workers > 0 and not self._tidied
        try:
            if idle:
                self._crew.shrink(lambda actors: self._appoint(actors, unless_in_use=True))
                self._tidied = True
            if self._crew.grow() or not crews:
                self._appoint(self._crew.actors)
            processes = self._crew.processes()
        except (RayError, OSError):  # a moment of trouble on the head; it is tried again
            return
        finally:
            self._adapted_at = time.monotonic()
        if processes != self._processes:
            self._processes = processes
            self._see(Processes("features", processes))

    def _appoint(self, actors: list[ActorHandle], *, unless_in_use: bool = False) -> bool:
        return bool(ray.get(self._line.appoint.remote(cloudpickle.dumps(actors), unless_in_use), timeout=10))
