"""The line between a job and its training workers: what happens comes out, the wish to stop goes in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycluster.distributed.session import TRAIN_SLOT, stop_requested
from raycluster.extraction import Progress
from raycluster.pretrain import Event
from raycluster.report import Watcher

SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_UNTIL_A_WORD = 60  # of explanation while the cluster finds no place for the workers


class Line:
    """Keeps events until the job hears them; one actor on the job's machine."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def tell(self, event: Event) -> None:
        self._events.append(event)

    def hear(self, stop: bool) -> list[Event]:
        """What happened since the last call. stop: the job was asked to stop."""
        self._stopping = stop
        events, self._events = self._events, []
        return events

    def stopping(self) -> bool:
        return self._stopping


def open_line() -> ActorHandle:
    """A line owned by the caller, on the caller's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(Line)
    actor: ActorHandle = remote.options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote()
    return actor


class Speaker:
    """A worker's end of the line."""

    def __init__(self, line: ActorHandle) -> None:
        self._line = line
        self._last = 0.0

    def tell(self, event: Event) -> None:
        """Pass an event on; of progress only a few a second."""
        if isinstance(event, Progress):
            if time.monotonic() - self._last < SECONDS_BETWEEN_LOOKS:
                return
            self._last = time.monotonic()
        self._line.tell.remote(event)

    def stopping(self) -> bool:
        try:
            return bool(ray.get(self._line.stopping.remote()))
        except RayActorError:  # it is being restarted
            return False


@contextmanager
def listening(line: ActorHandle, watcher: Watcher) -> Iterator[None]:
    """Meanwhile, show the watcher what the workers tell, and tell them of the wish to stop."""
    over = threading.Event()
    thread = threading.Thread(target=_listen, args=(line, watcher, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _listen(line: ActorHandle, watcher: Watcher, over: threading.Event) -> None:
    began, heard = time.monotonic(), False
    while True:
        last = over.wait(SECONDS_BETWEEN_LOOKS)
        try:
            events = ray.get(line.hear.remote(stop_requested()), timeout=10)
        except (RayActorError, GetTimeoutError):
            events = []
        for event in events:
            watcher.see(event)
        heard = heard or bool(events)
        if not heard and time.monotonic() - began > SECONDS_UNTIL_A_WORD:
            heard = True
            has = {name: f"{ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU", TRAIN_SLOT)}
            told = ", ".join(f"{name} {number}" for name, number in has.items())
            print(f"waiting for training workers; the cluster has {told}", flush=True)
        if last:
            return
